package client

import (
	"crypto/tls"
	"crypto/x509"
	"time"

	"github.com/opendepot/depot/internal/mtls"
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
			got = mtls.PinOf(c)
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
