package controlplane

import (
	"context"
	"time"
)

// Authority signs certificates. Each project has one of its own, and the
// server has one for the identities of agents and machines. Its keys are
// unsealed in memory only (keys-stay).
//
// A CSR is PKCS #10 in DER: its signature is checked, its public key is used,
// and nothing else of it is (own-lease). Malformed ones return Invalid.
type Authority interface {
	// NewAuthority makes a certificate authority for owner (a project's or the
	// server's id), sealed for storage.
	NewAuthority(owner, commonName string) (SealedAuthority, error)
	// Sign issues a leaf from the sealed authority of owner.
	Sign(ctx context.Context, a SealedAuthority, owner string, leaf Leaf) (Issued, error)
	// KeyHash checks a CSR and returns the SHA-256 of its public key.
	KeyHash(csr []byte) ([]byte, error)
	// Seal and Open protect small secrets of owner for storage.
	Seal(owner string, secret []byte) ([]byte, error)
	Open(owner string, sealed []byte) ([]byte, error)
}

// Leaf says what a certificate is for.
type Leaf struct {
	CSR []byte
	// Usage is clientAuth or serverAuth, never both.
	Usage LeafUsage
	// DNSNames and IPs are for servers; URIs name a client.
	DNSNames []string
	IPs      []string
	URIs     []string
	// NotBefore and NotAfter bound its validity.
	NotBefore time.Time
	NotAfter  time.Time
}

// LeafUsage is the one extended key usage of a leaf.
type LeafUsage int

// The usages.
const (
	UsageClient LeafUsage = iota + 1
	UsageServer
)

// Issued is a signed certificate.
type Issued struct {
	// Chain is the leaf and its authority, each DER.
	Chain    [][]byte
	NotAfter time.Time
}

// Authenticator turns credentials into principals. Its errors are
// Unauthenticated and say what to do.
type Authenticator interface {
	// Token authenticates a bearer token's text.
	Token(ctx context.Context, text string, now time.Time) (Principal, error)
	// AgentToken checks the text of an agent's join token and returns the token.
	AgentToken(ctx context.Context, text string, now time.Time) (Token, error)
	// MachineToken returns the join token of a machine, the same each time, and
	// CheckMachineToken reports whether text is it.
	MachineToken(key []byte, machine string) string
	CheckMachineToken(key []byte, machine, text string) bool
	// NewToken makes a token: t completed with id, hash and time, to be stored,
	// and the text that carries its secret.
	NewToken(t Token, now time.Time) (Token, string, error)
}
