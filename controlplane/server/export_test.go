package server

import "github.com/opendepot/depot/controlplane"

// Rights is the gate's table.
func Rights() map[string]controlplane.Right { return rights() }

// MaxLeases bounds the live leases of a scope.
const MaxLeases = maxLeases
