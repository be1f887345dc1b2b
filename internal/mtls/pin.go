package mtls

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/base32"
	"fmt"
	"strings"
)

// pinLength is that of a SHA-256 in base32 without padding.
const pinLength = 52

// PinOf returns the pin of a certificate: the SHA-256 of its
// SubjectPublicKeyInfo, in lower-case base32 without padding (52 characters). A
// pin names a key: a certificate that is renewed for the same key keeps it.
func PinOf(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:]))
}

// ValidPin reports whether pin has the form that [PinOf] gives.
func ValidPin(pin string) bool {
	if len(pin) != pinLength {
		return false
	}
	for _, c := range pin {
		if (c < 'a' || c > 'z') && (c < '2' || c > '7') {
			return false
		}
	}
	return true
}

// PinError reports a server whose chain lacks the pinned certificate.
type PinError struct {
	// Address is where the server was reached.
	Address string
	// Pin is what was expected, Got the pin of the last certificate shown.
	Pin, Got string
}

// Error says what to do about it.
func (e *PinError) Error() string {
	return fmt.Sprintf("the server at %s does not carry the pinned certificate (expected pin %s, it shows %s): "+
		"either the address leads to another server, or the server was set up anew and has a new key; "+
		"compare with the pin that the server prints at its start, and if that changed, log in again or use a new token",
		e.Address, e.Pin, e.Got)
}

// pinned returns the certificate of chain that has the pin and may vouch for
// the leaf: an authority's, or the leaf itself. Nil if there is none.
func pinned(chain []*x509.Certificate, pin string) *x509.Certificate {
	for i, c := range chain {
		if PinOf(c) == pin && (i == 0 || c.IsCA && c.BasicConstraintsValid) {
			return c
		}
	}
	return nil
}
