// Package ca signs certificates: it implements [controlplane.Authority] with
// keys that are kept sealed.
//
// Every owner (a project, or the server itself) has an authority of its own: an
// ECDSA P-256 key and a certificate that may sign leaves and nothing else. The
// key is stored sealed with AES-256-GCM under the master key, with its purpose
// and its owner's id as additional data, so that a sealed key that is copied to
// another owner's row does not open. The master key is a file outside the data
// directory (see [LoadMasterKey]): a stolen backup holds no key (keys-stay).
//
// A leaf has exactly one extended key usage, the names that the caller gives,
// and the public key of a CSR; nothing else is taken from a CSR (own-lease).
package ca

import (
	"context"
	"crypto"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"time"

	"github.com/opendepot/depot/controlplane"
)

const (
	// authorityLife is how long an authority's certificate is valid.
	authorityLife = 10 * 365 * 24 * time.Hour
	// authorityBackdate forgives clocks that are behind the server's.
	authorityBackdate = 24 * time.Hour
	// serialBytes of randomness make a serial number; RFC 5280, section
	// 4.1.2.2, allows at most 20 octets.
	serialBytes = 16
)

// Authority signs with sealed authorities. It is safe for concurrent use.
type Authority struct {
	aead    cipher.AEAD
	now     func() time.Time
	signers signers
}

var _ controlplane.Authority = (*Authority)(nil)

// New returns an Authority that seals with masterKey: 32 secret random bytes.
func New(masterKey []byte) (*Authority, error) {
	aead, err := newSealer(masterKey)
	if err != nil {
		return nil, err
	}
	return &Authority{aead: aead, now: time.Now}, nil
}

// NewAuthority makes a certificate authority for owner, valid for ten years
// from now. Its key leaves this process only sealed.
func (a *Authority) NewAuthority(owner, commonName string) (controlplane.SealedAuthority, error) {
	none := controlplane.SealedAuthority{}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return none, fmt.Errorf("make authority key of %s: %w", owner, err)
	}
	serial, err := newSerial()
	if err != nil {
		return none, err
	}
	now := a.now().UTC()
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: commonName},
		NotBefore:             now.Add(-authorityBackdate),
		NotAfter:              now.Add(authorityLife),
		KeyUsage:              x509.KeyUsageCertSign,
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return none, fmt.Errorf("sign authority of %s: %w", owner, err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return none, fmt.Errorf("encode authority key of %s: %w", owner, err)
	}
	return controlplane.SealedAuthority{
		Certificate: certificate,
		SealedKey:   seal(a.aead, purposeAuthority, owner, der),
	}, nil
}

// Sign issues a leaf for the public key of leaf.CSR from the authority of
// owner. It returns Invalid for a CSR that cannot be used; other errors are
// faults of ours. A leaf never outlives its authority.
func (a *Authority) Sign(
	ctx context.Context, sealed controlplane.SealedAuthority, owner string, leaf controlplane.Leaf,
) (controlplane.Issued, error) {
	none := controlplane.Issued{}
	if err := ctx.Err(); err != nil {
		return none, err
	}
	public, err := parseCSR(leaf.CSR)
	if err != nil {
		return none, err
	}
	s, err := a.signer(sealed, owner)
	if err != nil {
		return none, err
	}
	template, err := leafTemplate(leaf, s.certificate)
	if err != nil {
		return none, fmt.Errorf("sign certificate from the authority of %s: %w", owner, err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, s.certificate, public, s.key)
	if err != nil {
		return none, fmt.Errorf("sign certificate from the authority of %s: %w", owner, err)
	}
	return controlplane.Issued{
		Chain:    [][]byte{der, s.certificate.Raw},
		NotAfter: template.NotAfter,
	}, nil
}

// leafTemplate turns what the caller asked for into a certificate's fields. A
// leaf that mixes the roles of client and server is a fault of the caller's
// program, not of the one who sent the CSR.
func leafTemplate(leaf controlplane.Leaf, authority *x509.Certificate) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber:          serial,
		NotBefore:             later(leaf.NotBefore, authority.NotBefore).UTC(),
		NotAfter:              earlier(leaf.NotAfter, authority.NotAfter).UTC().Truncate(time.Second),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		DNSNames:              leaf.DNSNames,
	}
	switch leaf.Usage {
	case controlplane.UsageClient:
		if len(leaf.DNSNames)+len(leaf.IPs) > 0 {
			return nil, errors.New("a client's certificate must not name a host")
		}
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	case controlplane.UsageServer:
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	default:
		return nil, fmt.Errorf("unknown certificate usage %d", leaf.Usage)
	}
	if len(leaf.DNSNames)+len(leaf.IPs)+len(leaf.URIs) == 0 {
		return nil, errors.New("a certificate without a name would open nothing")
	}
	if !t.NotBefore.Before(t.NotAfter) {
		return nil, fmt.Errorf("validity from %s to %s is empty (the authority is valid from %s to %s)",
			leaf.NotBefore, leaf.NotAfter, authority.NotBefore, authority.NotAfter)
	}
	for _, text := range leaf.IPs {
		ip := net.ParseIP(text)
		if ip == nil {
			return nil, fmt.Errorf("%q is not an IP address", text)
		}
		t.IPAddresses = append(t.IPAddresses, ip)
	}
	for _, text := range leaf.URIs {
		u, err := url.Parse(text)
		if err != nil || u.Scheme == "" || u.Host == "" {
			return nil, fmt.Errorf("%q is not a URI with a scheme and a host", text)
		}
		t.URIs = append(t.URIs, u)
	}
	return t, nil
}

// signer returns the unsealed authority, from memory if it was used before.
func (a *Authority) signer(sealed controlplane.SealedAuthority, owner string) (*signer, error) {
	id := signerIDOf(sealed, owner)
	if s := a.signers.get(id); s != nil {
		return s, nil
	}
	s, err := a.unseal(sealed, owner)
	if err != nil {
		return nil, fmt.Errorf("open the authority of %s: %w", owner, err)
	}
	a.signers.put(id, s)
	return s, nil
}

func (a *Authority) unseal(sealed controlplane.SealedAuthority, owner string) (*signer, error) {
	certificate, err := x509.ParseCertificate(sealed.Certificate)
	if err != nil {
		return nil, fmt.Errorf("parse its certificate: %w", err)
	}
	der, err := open(a.aead, purposeAuthority, owner, sealed.SealedKey)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("parse its key: %w", err)
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("its key is a %T, which cannot sign", parsed)
	}
	if public, ok := key.Public().(*ecdsa.PublicKey); !ok || !public.Equal(certificate.PublicKey) {
		return nil, errors.New("its key is not that of its certificate")
	}
	return &signer{certificate: certificate, key: key}, nil
}

// Seal protects a small secret of owner for storage.
func (a *Authority) Seal(owner string, secret []byte) ([]byte, error) {
	if len(secret) > maxSecret {
		return nil, fmt.Errorf("seal a secret of %s: %d bytes are more than %d", owner, len(secret), maxSecret)
	}
	return seal(a.aead, purposeSecret, owner, secret), nil
}

// Open returns the secret that [Authority.Seal] protected for owner.
func (a *Authority) Open(owner string, sealed []byte) ([]byte, error) {
	secret, err := open(a.aead, purposeSecret, owner, sealed)
	if err != nil {
		return nil, fmt.Errorf("open a secret of %s: %w", owner, err)
	}
	return secret, nil
}

func newSerial() (*big.Int, error) {
	b := make([]byte, serialBytes)
	if _, err := rand.Read(b); err != nil {
		return nil, fmt.Errorf("make a serial number: %w", err)
	}
	b[0] |= 0x80 // never zero, and of one length
	return new(big.Int).SetBytes(b), nil
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
