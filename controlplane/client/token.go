package client

import (
	"errors"
	"log/slog"
	"strings"
)

// The parts of a token's text. A secret is 32 random bytes and a pin is the
// SHA-256 of a public key; both are 52 characters in base32 without padding.
const (
	tokenIDLen     = 32
	tokenSecretLen = 52
	pinLen         = 52
)

// Token is a bearer token. It never shows its secret by accident: printed or
// logged it is its kind and id. The zero Token is no token.
type Token struct {
	text, kind, id, pin string
}

// ParseToken reads a token's text, depot_<kind>_<id>_<secret>[<pin>]. The
// error does not repeat the text.
func ParseToken(text string) (Token, error) {
	parts := strings.Split(strings.TrimSpace(text), "_")
	if len(parts) != 4 || parts[0] != "depot" || parts[1] == "" {
		return Token{}, errors.New("the token has not the form depot_<kind>_<id>_<secret>: copy all of what `docker depot token create` printed")
	}
	t := Token{text: strings.Join(parts, "_"), kind: parts[1], id: parts[2]}
	switch secret := parts[3]; {
	case len(t.id) != tokenIDLen || !consistsOf(t.id, "0123456789abcdef"):
		return Token{}, errors.New("the token's id is damaged: copy all of what `docker depot token create` printed")
	case len(secret) != tokenSecretLen && len(secret) != tokenSecretLen+pinLen, !consistsOf(secret, base32Digits):
		return Token{}, errors.New("the token's secret is damaged or cut off: copy all of what `docker depot token create` printed")
	default:
		t.pin = secret[tokenSecretLen:]
	}
	return t, nil
}

// base32Digits is the alphabet of RFC 4648, in lower case.
const base32Digits = "abcdefghijklmnopqrstuvwxyz234567"

// Kind is what the token is for: user, project or agent.
func (t Token) Kind() string { return t.kind }

// ID is the token's id without its prefix; it is no secret.
func (t Token) ID() string { return t.id }

// Pin is the pin of the server that made the token; empty if that server's
// certificate is to be checked against the system's roots.
func (t Token) Pin() string { return t.pin }

// Secret returns the whole text, for the Authorization header and for storing.
func (t Token) Secret() string { return t.text }

// IsZero reports whether there is no token.
func (t Token) IsZero() bool { return t.text == "" }

// String returns the token without its secret.
func (t Token) String() string {
	if t.IsZero() {
		return "no token"
	}
	return "depot_" + t.kind + "_" + t.id + "_(redacted)"
}

// GoString returns the token without its secret.
func (t Token) GoString() string { return t.String() }

// LogValue returns the token without its secret.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }

func consistsOf(s, digits string) bool {
	for _, c := range s {
		if !strings.ContainsRune(digits, c) {
			return false
		}
	}
	return true
}
