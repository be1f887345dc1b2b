// Package credentials finds out which control plane to talk to and as whom.
//
// There are three sources, looked at in this order: the environment
// (DEPOT_API_URL, DEPOT_TOKEN, DEPOT_PROJECT_ID, for CI), the nearest
// depot.json (the project of a checkout), and the login that
// `docker depot login` stored. [Source] is the one place that knows the order.
//
// A stored login is two things: a file of mode 0600 that says which servers
// are known, and for each its token, in the operating system's keyring or,
// where there is none, in that same file. Nothing here is ever written to a
// builder's configuration.
package credentials
