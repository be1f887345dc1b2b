// Package e2e tests the whole system: real control planes, agents, machines,
// buildkitds, Docker CLIs and engines, in network namespaces of their own. See
// package site for what a test starts, and `make e2e` for how to run them.
package e2e
