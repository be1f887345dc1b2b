package auth

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/opendepot/depot/controlplane"
)

func TestSecretIsNotShown(t *testing.T) {
	t.Parallel()
	p := presented{kind: controlplane.TokenUser, id: "tok_1", secret: secret(strings.Repeat("s", secretLength))}
	var logged bytes.Buffer
	slog.New(slog.NewJSONHandler(&logged, nil)).Info("token", "secret", p.secret)
	for _, shown := range []string{logged.String(), fmt.Sprint(p.secret), fmt.Sprintf("%v %+v %#v", p.secret, p.secret, p.secret)} {
		if strings.Contains(shown, "ssss") || !strings.Contains(shown, "redacted") {
			t.Errorf("shown: %s", shown)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("depot_user_" + strings.Repeat("0", 32) + "_" + strings.Repeat("a", 52))
	f.Add("depot_project_" + strings.Repeat("f", 32) + "_" + strings.Repeat("7", 104))
	f.Add("depot_agent__")
	f.Fuzz(func(t *testing.T, text string) {
		p, err := parse(text)
		if err != nil {
			if controlplane.CodeOf(err) != controlplane.Unauthenticated || p != (presented{}) {
				t.Errorf("got %#v and error %v", p, err)
			}
			return
		}
		// What parses has one spelling, up to the pin.
		if again := p.text(""); !strings.HasPrefix(text, again) || len(text) != len(again) && len(text) != len(again)+pinLength {
			t.Errorf("a token was read as another")
		}
	})
}

func FuzzCheckJoin(f *testing.F) {
	machine := "mch_" + strings.Repeat("0", 32)
	f.Add(machine, JoinToken([]byte("another key"), machine))
	f.Fuzz(func(t *testing.T, machine, token string) {
		key := []byte("key")
		if CheckJoin(key, machine, token) && token != JoinToken(key, machine) {
			t.Error("took a token that is not the machine's")
		}
	})
}
