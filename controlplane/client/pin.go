package client

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base32"
	"strings"
	"time"
)

// pinnedName is the name that every control plane's own certificate carries.
const pinnedName = "depot-controlplane"

// verifyPin returns a check that the peer's certificate is for a control plane
// and chains to the authority that pin names. The server sends that authority
// along; anyone can, but nobody else can sign for it.
func verifyPin(pin string, now func() time.Time) func(tls.ConnectionState) error {
	return func(s tls.ConnectionState) error {
		roots, between := x509.NewCertPool(), x509.NewCertPool()
		found, got := false, ""
		for _, c := range s.PeerCertificates[1:] {
			got = pinOf(c)
			if got == pin {
				roots.AddCert(c)
				found = true
				continue
			}
			between.AddCert(c)
		}
		if !found {
			return &PinError{Want: pin, Got: got}
		}
		_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{
			DNSName:       pinnedName,
			Roots:         roots,
			Intermediates: between,
			CurrentTime:   now(),
			KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		})
		if err != nil {
			return &tls.CertificateVerificationError{UnverifiedCertificates: s.PeerCertificates, Err: err}
		}
		return nil
	}
}

// pinOf returns the pin of an authority: the SHA-256 of its public key
// (SubjectPublicKeyInfo), base32 in lower case without padding.
func pinOf(c *x509.Certificate) string {
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:]))
}
