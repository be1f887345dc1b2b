// Package driver is the buildx driver "depot": it leases a machine, connects
// to it, and prepares each build. Everything that builds is upstream's.
//
// A builder of this driver has one node per architecture, each with an
// endpoint depot://host[:port]/organization/project/arch. buildx makes a
// [Driver] per node, some of them only to throw them away, and calls it in one
// of these orders:
//
//	build, bake          Info, Bootstrap unless Info said Running, Client
//	ls, inspect, create  Info, and Client where it said Running
//	du, prune, history   Client
//	dial-stdio           Info, Bootstrap, Client, Dial
//
// Info asks and starts nothing. Bootstrap waits for a machine and shows what
// for. Client connects, and launches only if nothing was asked before. There
// is no call at the end, so leases live in a table of the process, keyed by
// what they are for; each is renewed by a goroutine of its own until
// [Factory.ReleaseAll], which main calls before it exits.
//
// A lease's private key is made here and stays here (keys-stay). The
// connection to the machine is TLS in both directions, by certificates that
// open that one machine (own-lease).
package driver
