// Package plugin is depot's Docker CLI plugin: one binary under two names. As
// docker-buildx it is upstream's buildx with one driver more; as docker-depot
// it has the commands that set up and look after a depot.
//
// [Run] is the whole program but for main. It behaves like upstream's main, to
// its exit codes, because scripts and Compose rely on that; what it adds is the
// driver, a default endpoint for `create --driver depot`, and the release of
// the process's leases at the end.
//
// The commands of `docker depot` hang on [NewRootCommand], one file per noun,
// each made by a function that takes the [App].
package plugin
