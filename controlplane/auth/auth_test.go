package auth_test

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opendepot/depot/controlplane"
	"github.com/opendepot/depot/controlplane/auth"
	"github.com/opendepot/depot/controlplane/store"
)

func now() time.Time { return time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC) }

func pin() string { return strings.Repeat("pin2", 13) }

// fixture is an authenticator over a store with an organization and a project.
type fixture struct {
	*auth.Authenticator
	store *store.Store
}

func newFixture(t *testing.T, pin string) fixture {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	s, err := store.Open(t.Context(), store.Config{Path: filepath.Join(t.TempDir(), "depot.db"), Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	err = s.Update(t.Context(), func(tx controlplane.Tx) error {
		if err := tx.PutOrganization(t.Context(), controlplane.Organization{ID: "org_1", Name: "acme"}); err != nil {
			return err
		}
		return tx.PutProject(t.Context(), controlplane.Project{ID: "prj_1", Org: "org_1", Name: "web"})
	})
	if err != nil {
		t.Fatal(err)
	}
	a, err := auth.New(auth.Config{Store: s, Pin: pin, Random: rand.Reader, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	return fixture{Authenticator: a, store: s}
}

// token makes and stores a token, and returns it with its text.
func (f fixture) token(t *testing.T, token controlplane.Token) (controlplane.Token, string) {
	t.Helper()
	token, text, err := f.NewToken(token, now())
	if err != nil {
		t.Fatal(err)
	}
	if err := f.store.Update(t.Context(), func(tx controlplane.Tx) error { return tx.PutToken(t.Context(), token) }); err != nil {
		t.Fatal(err)
	}
	return token, text
}

func (f fixture) stored(t *testing.T, id string) (token controlplane.Token) {
	t.Helper()
	err := f.store.View(t.Context(), func(tx controlplane.Tx) (err error) {
		token, err = tx.Token(t.Context(), id)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func TestPrincipals(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pin())
	tests := map[string]struct {
		token controlplane.Token
		want  controlplane.Principal
	}{
		"the server's administrator": {
			controlplane.Token{Kind: controlplane.TokenUser, Name: "root", Role: controlplane.RoleAdmin},
			controlplane.Principal{Kind: controlplane.PrincipalUser, Name: "root", Role: controlplane.RoleAdmin},
		},
		"a person": {
			controlplane.Token{Kind: controlplane.TokenUser, Name: "ann", Org: "org_1", Role: controlplane.RoleBuilder, Expires: now().Add(time.Hour)},
			controlplane.Principal{Kind: controlplane.PrincipalUser, Name: "ann", Org: "org_1", Role: controlplane.RoleBuilder, Expires: now().Add(time.Hour)},
		},
		"a project, with its organization": {
			controlplane.Token{Kind: controlplane.TokenProject, Name: "ci", Project: "prj_1", Role: controlplane.RoleBuilder},
			controlplane.Principal{Kind: controlplane.PrincipalProject, Name: "ci", Org: "org_1", Project: "prj_1", Role: controlplane.RoleBuilder},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			token, text := f.token(t, test.token)
			test.want.ID = token.ID
			got, err := f.Token(t.Context(), text, now())
			if d := cmp.Diff(test.want, got); d != "" || err != nil {
				t.Errorf("error %v, principal (-want +got):\n%s", err, d)
			}
		})
	}
}

func TestTokenText(t *testing.T) {
	t.Parallel()
	for _, p := range []string{"", pin()} {
		f := newFixture(t, p)
		token, text := f.token(t, controlplane.Token{Kind: controlplane.TokenUser, Name: "ann", Role: controlplane.RoleAdmin})
		form := regexp.MustCompile(`^depot_user_([0-9a-f]{32})_([a-z2-7]{52})` + p + `$`)
		parts := form.FindStringSubmatch(text)
		if parts == nil {
			t.Fatalf("the text has another form, with pin %q", p)
		}
		hash := sha256.Sum256([]byte(parts[2]))
		if token.ID != "tok_"+parts[1] || !bytes.Equal(token.Hash, hash[:]) || !token.Created.Equal(now()) {
			t.Errorf("the stored token does not fit its text: %+v", token)
		}
		if shown := fmt.Sprintf("%+v", f.stored(t, token.ID)); strings.Contains(shown, parts[2]) {
			t.Error("the store holds the secret")
		}
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "")
	user, text := f.token(t, controlplane.Token{Kind: controlplane.TokenUser, Name: "ann", Org: "org_1", Role: controlplane.RoleBuilder})
	_, other := f.token(t, controlplane.Token{Kind: controlplane.TokenUser, Name: "bob", Org: "org_1", Role: controlplane.RoleBuilder})
	_, expired := f.token(t, controlplane.Token{Kind: controlplane.TokenUser, Name: "old", Org: "org_1", Role: controlplane.RoleBuilder, Expires: now()})
	_, agent := f.token(t, controlplane.Token{Kind: controlplane.TokenAgent, Name: "host"})
	removed, removedText := f.token(t, controlplane.Token{Kind: controlplane.TokenUser, Name: "gone", Role: controlplane.RoleAdmin})
	if err := f.store.Update(t.Context(), func(tx controlplane.Tx) error { return tx.DeleteToken(t.Context(), removed.ID) }); err != nil {
		t.Fatal(err)
	}
	secret, otherSecret := text[len(text)-52:], other[len(other)-52:]
	const malformed, unknown = "has not the form", "not known to this server"
	tests := map[string]struct{ text, mention string }{
		"empty":                       {"", malformed},
		"words":                       {"let me in", malformed},
		"cut off":                     {text[:len(text)-1], malformed},
		"too long":                    {text + "a", malformed},
		"upper case":                  {strings.ToUpper(text), malformed},
		"space":                       {text + " ", malformed},
		"unknown kind":                {strings.Replace(text, "_user_", "_root_", 1), malformed},
		"machine's":                   {auth.JoinToken([]byte("key"), "mch_"+strings.Repeat("0", 32)), malformed},
		"another's secret":            {strings.Replace(text, secret, otherSecret, 1), unknown},
		"another kind":                {strings.Replace(text, "_user_", "_project_", 1), unknown},
		"another id":                  {strings.Replace(text, user.ID[4:], strings.Repeat("0", 32), 1), unknown},
		"removed":                     {removedText, unknown},
		"expired":                     {expired, "expired on 2026-03-01T12:00:00Z"},
		"expired with a wrong secret": {strings.Replace(expired, expired[len(expired)-52:], otherSecret, 1), unknown},
		"agent's":                     {agent, "docker depot token create"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, err := f.Token(t.Context(), test.text, now())
			if controlplane.CodeOf(err) != controlplane.Unauthenticated || !strings.Contains(err.Error(), test.mention) || p != (controlplane.Principal{}) {
				t.Errorf("got principal %+v and error %v, want Unauthenticated and %q", p, err, test.mention)
			}
			if err != nil && (strings.Contains(err.Error(), secret) || strings.Contains(err.Error(), otherSecret)) {
				t.Error("the message repeats a secret")
			}
		})
	}
}

// TestPinIsTheClients checks that a server which changed its certificate still
// knows its tokens: the pin is for the client to check.
func TestPinIsTheClients(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pin())
	_, text := f.token(t, controlplane.Token{Kind: controlplane.TokenUser, Role: controlplane.RoleAdmin})
	for _, other := range []string{"", strings.Repeat("a", 52)} {
		if _, err := f.Token(t.Context(), strings.TrimSuffix(text, pin())+other, now()); err != nil {
			t.Errorf("with pin %q: %v", other, err)
		}
	}
}

func TestAgentToken(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pin())
	want, text := f.token(t, controlplane.Token{Kind: controlplane.TokenAgent, Name: "host", Expires: now().Add(time.Hour)})
	got, err := f.AgentToken(t.Context(), text, now())
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Errorf("error %v, token (-want +got):\n%s", err, d)
	}
	_, user := f.token(t, controlplane.Token{Kind: controlplane.TokenUser, Role: controlplane.RoleAdmin})
	for name, test := range map[string]struct {
		text    string
		at      time.Time
		mention string
	}{
		"user's":  {user, now(), "docker depot agent token"},
		"expired": {text, now().Add(time.Hour), "expired"},
		"damaged": {text[1:], now(), "has not the form"},
	} {
		if _, err := f.AgentToken(t.Context(), test.text, test.at); controlplane.CodeOf(err) != controlplane.Unauthenticated || !strings.Contains(err.Error(), test.mention) {
			t.Errorf("%s: got error %v, want Unauthenticated and %q", name, err, test.mention)
		}
	}
}

func TestUsed(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "")
	token, text := f.token(t, controlplane.Token{Kind: controlplane.TokenUser, Role: controlplane.RoleAdmin})
	for _, step := range []struct{ at, want time.Duration }{
		{0, 0},
		{59 * time.Second, 0},
		{time.Minute, time.Minute},
		{90 * time.Second, time.Minute},
		{30 * time.Second, time.Minute}, // a clock that went back takes nothing back
	} {
		if _, err := f.Token(t.Context(), text, now().Add(step.at)); err != nil {
			t.Fatal(err)
		}
		if got := f.stored(t, token.ID).Used; !got.Equal(now().Add(step.want)) {
			t.Errorf("used at +%s: recorded %s, want +%s", step.at, got, step.want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	if _, err := auth.New(auth.Config{Pin: "short"}); err == nil || !strings.Contains(err.Error(), `"short"`) {
		t.Errorf("got error %v, want one that names the pin", err)
	}
	f := newFixture(t, "")
	// Without a log, a full disk would be a panic at each call.
	if _, err := auth.New(auth.Config{Store: f.store, Random: rand.Reader}); err == nil || !strings.Contains(err.Error(), "a log") {
		t.Errorf("got error %v, want one that names the log", err)
	}
	for name, token := range map[string]controlplane.Token{
		"no kind":              {},
		"project without one":  {Kind: controlplane.TokenProject},
		"user with a project":  {Kind: controlplane.TokenUser, Project: "prj_1"},
		"agent with a project": {Kind: controlplane.TokenAgent, Project: "prj_1"},
	} {
		if _, text, err := f.NewToken(token, now()); err == nil || text != "" {
			t.Errorf("%s: made a token", name)
		}
	}
}

func TestJoinToken(t *testing.T) {
	t.Parallel()
	key := bytes.Repeat([]byte{7}, 32)
	machine, other := "mch_"+strings.Repeat("a", 32), "mch_"+strings.Repeat("b", 32)
	token := auth.JoinToken(key, machine)
	if !regexp.MustCompile(`^depot_machine_a{32}_[a-z2-7]{52}$`).MatchString(token) || token != auth.JoinToken(key, machine) {
		t.Errorf("got %q, or another the second time", token)
	}
	tests := map[string]struct {
		key            []byte
		machine, token string
		want           bool
	}{
		"its own":         {key, machine, token, true},
		"another machine": {key, other, token, false},
		"renamed":         {key, other, strings.ReplaceAll(token, strings.Repeat("a", 32), strings.Repeat("b", 32)), false},
		"another key":     {key[1:], machine, token, false},
		"no key":          {nil, machine, auth.JoinToken(nil, machine), false},
		"cut off":         {key, machine, token[:len(token)-1], false},
		"empty":           {key, machine, "", false},
		"no machine":      {key, "", auth.JoinToken(key, ""), false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if got := auth.CheckJoin(test.key, test.machine, test.token); got != test.want {
				t.Errorf("got %t", got)
			}
		})
	}
}
