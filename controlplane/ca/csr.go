package ca

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"

	"github.com/opendepot/depot/controlplane"
)

const (
	// maxCSR bounds a CSR in bytes; one with an RSA key of 8192 bits has 2300.
	maxCSR = 16 << 10
	// RSA keys in bits: fewer are weak, more cost a verifier too much.
	minRSA = 2048
	maxRSA = 8192
)

// KeyHash checks a CSR and returns the SHA-256 of its public key, encoded as
// SubjectPublicKeyInfo exactly as [Authority.Sign] puts it into a certificate.
func (a *Authority) KeyHash(csr []byte) ([]byte, error) {
	public, err := parseCSR(csr)
	if err != nil {
		return nil, err
	}
	// The CSR's own encoding is not hashed: a key must have one hash only.
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, fmt.Errorf("encode a public key: %w", err)
	}
	sum := sha256.Sum256(der)
	return sum[:], nil
}

// parseCSR returns the public key of a PKCS #10 request in DER whose signature
// proves that the sender has the private key. All of its errors are Invalid.
func parseCSR(der []byte) (any, error) {
	if len(der) > maxCSR {
		return nil, controlplane.Errorf(controlplane.Invalid,
			"the certificate request has %d bytes, more than the %d that are read: send one with a single key and no extensions", len(der), maxCSR)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, &controlplane.Error{
			Code:    controlplane.Invalid,
			Message: "the certificate request is not PKCS #10 in DER: the client is damaged or of another version",
			Err:     err,
		}
	}
	// The key first: an absurd one must not cost a verification.
	if err := checkKey(csr.PublicKey); err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, &controlplane.Error{
			Code:    controlplane.Invalid,
			Message: "the certificate request is not signed by its own key: the sender does not hold the private key, or the request was changed on its way",
			Err:     err,
		}
	}
	return csr.PublicKey, nil
}

func checkKey(public any) error {
	const use = "use ECDSA P-256 or P-384, Ed25519, or RSA of 2048 to 8192 bits"
	switch k := public.(type) {
	case ed25519.PublicKey:
		return nil
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
		return controlplane.Errorf(controlplane.Invalid, "the certificate request has a key on curve %s: %s", k.Curve.Params().Name, use)
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits < minRSA || bits > maxRSA {
			return controlplane.Errorf(controlplane.Invalid, "the certificate request has an RSA key of %d bits: %s", bits, use)
		}
		return nil
	}
	return controlplane.Errorf(controlplane.Invalid, "the certificate request has a key of an unknown kind: %s", use)
}
