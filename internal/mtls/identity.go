package mtls

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync/atomic"
)

// Key is a private key that lives in this process's memory and has no way out
// of it (keys-stay): ECDSA on P-256.
type Key struct {
	private *ecdsa.PrivateKey
}

// NewKey makes a key.
func NewKey() (*Key, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	return &Key{private: private}, nil
}

// CSR returns a PKCS #10 request in DER that holds the public key and nothing
// else: what the certificate will say is the authority's decision alone.
func (k *Key) CSR() ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k.private)
	if err != nil {
		return nil, fmt.Errorf("make certificate request: %w", err)
	}
	return der, nil
}

// Public returns the public half.
func (k *Key) Public() crypto.PublicKey { return k.private.Public() }

// Identity is a certificate with its key, replaceable at any time: handshakes
// that begin after Install use the new one. It is safe for concurrent use; the
// zero value has no certificate yet.
type Identity struct {
	current atomic.Pointer[tls.Certificate]
}

// NewIdentity returns an Identity that holds chain: see [Identity.Install].
func NewIdentity(key *Key, chain [][]byte) (*Identity, error) {
	i := &Identity{}
	if err := i.Install(key, chain); err != nil {
		return nil, err
	}
	return i, nil
}

// Install replaces the certificate by chain: the leaf, then any intermediates,
// each DER. A leaf for another key is refused, and what was there stays.
func (i *Identity) Install(key *Key, chain [][]byte) error {
	return i.Set(tls.Certificate{Certificate: chain, PrivateKey: key.private})
}

// Set is Install for a certificate that was made elsewhere, such as one that
// an administrator gives the control plane as files.
func (i *Identity) Set(c tls.Certificate) error {
	if len(c.Certificate) == 0 {
		return errors.New("install certificate: the chain is empty")
	}
	leaf, err := x509.ParseCertificate(c.Certificate[0])
	if err != nil {
		return fmt.Errorf("install certificate: %w", err)
	}
	signer, ok := c.PrivateKey.(crypto.Signer)
	if !ok {
		return errors.New("install certificate: it has no private key")
	}
	public, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(leaf.PublicKey) {
		return errors.New("install certificate: it was issued for another key")
	}
	c.Leaf = leaf
	i.current.Store(&c)
	return nil
}

// Leaf returns the current certificate, or nil if there is none yet.
func (i *Identity) Leaf() *x509.Certificate {
	if c := i.current.Load(); c != nil {
		return c.Leaf
	}
	return nil
}

// Chain returns the current leaf and intermediates, DER; nil before Install.
func (i *Identity) Chain() [][]byte {
	if c := i.current.Load(); c != nil {
		return c.Certificate
	}
	return nil
}

// Anchors is a set of trust anchors, replaceable at any time. It is safe for
// concurrent use.
type Anchors struct {
	pool atomic.Pointer[x509.CertPool]
}

// NewAnchors returns the set of the given CA certificates, each DER.
func NewAnchors(ders [][]byte) (*Anchors, error) {
	a := &Anchors{}
	if err := a.Replace(ders); err != nil {
		return nil, err
	}
	return a, nil
}

// Replace makes ders the whole set. An empty set and a certificate that is no
// authority's are refused, and what was there stays: an empty answer never
// means "trust nobody", let alone "trust everybody".
func (a *Anchors) Replace(ders [][]byte) error {
	if len(ders) == 0 {
		return errors.New("replace trust anchors: the new set is empty")
	}
	pool := x509.NewCertPool()
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("replace trust anchors: %w", err)
		}
		if !c.IsCA || !c.BasicConstraintsValid {
			return fmt.Errorf("replace trust anchors: %q is not a certificate authority", c.Subject)
		}
		pool.AddCert(c)
	}
	a.pool.Store(pool)
	return nil
}

// load returns the current set; an Anchors that was never filled trusts nobody
// (a nil pool would mean the system's roots).
func (a *Anchors) load() *x509.CertPool {
	if p := a.pool.Load(); p != nil {
		return p
	}
	return x509.NewCertPool()
}
