// Package mtls makes [tls.Config] values from memory: nothing of a key is read
// from or written to a file, and certificates and trust anchors can be replaced
// while connections live.
//
// A process makes a [Key], sends its [Key.CSR] to the control plane, and puts
// the chain that comes back into an [Identity] (keys-stay). What it trusts is a
// set of [Anchors], or the control plane's pin (see [PinOf]). From these,
// [Client] and [Server] make configurations; each handshake looks at what the
// Identity and the Anchors hold at that moment, so renewal and rotation need no
// new configuration, and end no connection:
//
//	key, err := mtls.NewKey()
//	// send key.CSR(), receive chain and anchors
//	id, err := mtls.NewIdentity(key, chain)
//	trust, err := mtls.NewAnchors(anchors)
//	conn, err := tls.Dial("tcp", address, mtls.Client{
//		Identity: id, Anchors: trust, ServerName: name, NextProtos: []string{"h2"},
//	}.Config())
//
// All configurations speak TLS 1.3 and nothing older, never resume sessions (a
// resumed session would keep a trust that was taken back), and tell client and
// server certificates apart: each side insists on the extended key usage of the
// other's role.
//
// A client's certificate says what it opens by a [LeafName].
package mtls
