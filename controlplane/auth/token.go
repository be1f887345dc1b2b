package auth

import (
	"crypto/sha256"
	"encoding/base32"
	"log/slog"
	"strings"

	"github.com/opendepot/depot/controlplane"
)

const (
	// secretLength and pinLength are those of 32 bytes in base32 without
	// padding.
	secretLength = 52
	pinLength    = 52
	// base32Digits is the alphabet of RFC 4648, section 6, in lower case.
	base32Digits = "abcdefghijklmnopqrstuvwxyz234567"
)

func base32Encoding() *base32.Encoding {
	return base32.NewEncoding(base32Digits).WithPadding(base32.NoPadding)
}

// secret is the random part of a token, as it is written.
type secret string

// hash is what is stored of a secret: 32 random bytes need no slow hash. The
// text is hashed as it stands, so each token has one spelling only.
func (s secret) hash() [sha256.Size]byte { return sha256.Sum256([]byte(s)) }

// LogValue keeps the secret out of logs.
func (secret) LogValue() slog.Value { return slog.StringValue("redacted") }

// String keeps the secret out of messages.
func (secret) String() string { return "redacted" }

// GoString keeps the secret out of %#v.
func (secret) GoString() string { return "redacted" }

// presented is a token as its bearer shows it.
type presented struct {
	kind   controlplane.TokenKind
	id     string // tok_…
	secret secret
}

// text writes the token, with the server's pin if it has one.
func (p presented) text(pin string) string {
	digits := strings.TrimPrefix(p.id, string(controlplane.KindToken)+"_")
	return "depot_" + string(p.kind) + "_" + digits + "_" + string(p.secret) + pin
}

// parse reads a token's text. The pin is the client's to check; here it only
// has to look like one. Errors are Unauthenticated and repeat nothing of text.
func parse(text string) (presented, error) {
	malformed := controlplane.Errorf(controlplane.Unauthenticated,
		"the token has not the form depot_<kind>_<id>_<secret>: copy all of what was printed when it was made")
	parts := strings.Split(text, "_")
	if len(parts) != 4 || parts[0] != "depot" {
		return presented{}, malformed
	}
	p := presented{
		kind: controlplane.TokenKind(parts[1]),
		id:   string(controlplane.KindToken) + "_" + parts[2],
	}
	last := parts[3]
	if !knownKind(p.kind) || !controlplane.ValidID(controlplane.KindToken, p.id) ||
		len(last) != secretLength && len(last) != secretLength+pinLength || !consistsOf(last, base32Digits) {
		return presented{}, malformed
	}
	p.secret = secret(last[:secretLength])
	return p, nil
}

func knownKind(k controlplane.TokenKind) bool {
	switch k {
	case controlplane.TokenUser, controlplane.TokenProject, controlplane.TokenAgent:
		return true
	}
	return false
}

func consistsOf(s, digits string) bool { return strings.Trim(s, digits) == "" }
