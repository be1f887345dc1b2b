package credentials_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/driver/credentials"
	"github.com/zalando/go-keyring"
)

func token(t *testing.T, digit string) client.Token {
	t.Helper()
	tok, err := client.ParseToken("depot_user_" + strings.Repeat(digit, 32) + "_" + strings.Repeat("q", 52))
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func newStore(t *testing.T, noKeyring bool) credentials.Store {
	t.Helper()
	keyring.MockInit() // the library's own, in memory; e2e has a real one
	dir := filepath.Join(t.TempDir(), "depot")
	return credentials.Store{Dir: func() string { return dir }, NoKeyring: noKeyring}
}

func TestStore(t *testing.T) {
	for name, noKeyring := range map[string]bool{"keyring": false, "file": true} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t, noKeyring)
			if _, err := s.Current(); !errors.Is(err, credentials.ErrNotFound) {
				t.Fatalf("an empty store has %v", err)
			}
			a := credentials.Login{URL: "https://a", Token: token(t, "a"), Project: "acme/web"}
			b := credentials.Login{URL: "https://b", Token: token(t, "b")}
			for _, l := range []credentials.Login{a, b, a} {
				saved, err := s.Save(l)
				if err != nil || saved.InKeyring == noKeyring {
					t.Fatalf("Save = %+v, %v", saved, err)
				}
			}
			if got, err := s.Current(); err != nil || got.URL != a.URL || got.Project != a.Project {
				t.Errorf("Current = %+v, %v", got, err)
			}
			for _, l := range []credentials.Login{a, b} {
				if got, err := s.Load(l.URL); err != nil || got.Token != l.Token {
					t.Errorf("Load(%s) = %+v, %v", l.URL, got, err)
				}
			}
			name := filepath.Join(s.Dir(), "logins.json")
			data, err := os.ReadFile(name) //nolint:gosec // the test's own file
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(data), a.Token.Secret()) != noKeyring {
				t.Errorf("the token is in the wrong place: %s", strings.ReplaceAll(string(data), a.Token.Secret(), "…"))
			}
			if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("mode %v, %v, want 0600", info.Mode(), err)
			}
			if err := s.Delete(a.URL); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Load(a.URL); !errors.Is(err, credentials.ErrNotFound) {
				t.Errorf("a deleted login: %v", err)
			}
			if err := s.Delete(a.URL); !errors.Is(err, credentials.ErrNotFound) {
				t.Errorf("deleting again: %v", err)
			}
			if _, err := keyring.Get("depot", a.URL); !errors.Is(err, keyring.ErrNotFound) {
				t.Errorf("the keyring still has it: %v", err)
			}
		})
	}
}

func TestStoreWithoutAKeyring(t *testing.T) {
	s := newStore(t, false)
	keyring.MockInitWithError(errors.New("no secret service"))
	saved, err := s.Save(credentials.Login{URL: "https://a", Token: token(t, "a")})
	if err != nil || saved.InKeyring {
		t.Fatalf("Save = %+v, %v, want the file", saved, err)
	}
	if got, err := s.Load("https://a"); err != nil || got.Token != saved.Token {
		t.Errorf("Load = %+v, %v", got, err)
	}
}

func TestDamagedStore(t *testing.T) {
	s := newStore(t, true)
	if _, err := s.Save(credentials.Login{URL: "https://a", Token: token(t, "a")}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.Dir(), "logins.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load("https://a"); err == nil || !strings.Contains(err.Error(), "docker depot login") {
		t.Errorf("a damaged file says %v", err)
	}
}

func TestSourceOrder(t *testing.T) {
	s := newStore(t, true)
	stored := token(t, "a")
	if _, err := s.Save(credentials.Login{URL: "https://a", Token: stored, Project: "acme/stored"}); err != nil {
		t.Fatal(err)
	}
	checkout := t.TempDir()
	inner := filepath.Join(checkout, "x", "y")
	if err := os.MkdirAll(inner, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(checkout, "depot.json"), []byte(`{"id":"prj_1"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{}
	src := credentials.Source{Env: func(k string) string { return env[k] }, Dir: t.TempDir(), Store: s}
	check := func(server, project string, tok client.Token) {
		t.Helper()
		url, err := src.Server()
		if err != nil || url != server {
			t.Errorf("Server = %q, %v, want %q", url, err, server)
		}
		p, err := src.Project(url)
		if err != nil || p != project {
			t.Errorf("Project = %q, %v, want %q", p, err, project)
		}
		got, err := src.Token(url)
		if !tok.IsZero() && (err != nil || got != tok) {
			t.Errorf("Token = %v, %v, want %v", got, err, tok)
		}
		if tok.IsZero() && (err == nil || !strings.Contains(err.Error(), "docker depot login "+server)) {
			t.Errorf("Token = %v, %v, want an error that says how to log in", got, err)
		}
	}
	check("https://a", "acme/stored", stored)
	src.Dir = inner
	check("https://a", "prj_1", stored)
	env[credentials.EnvProject] = "acme/env"
	check("https://a", "acme/env", stored)
	env[credentials.EnvURL] = "https://other"
	check("https://other", "acme/env", client.Token{})
	env[credentials.EnvToken] = token(t, "c").Secret()
	check("https://other", "acme/env", token(t, "c"))
	src.Dir = t.TempDir()
	delete(env, credentials.EnvProject)
	check("https://other", "", token(t, "c")) // the stored project is another server's
}

func TestCAFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "ca.pem")
	src := credentials.Source{Env: func(k string) string {
		return map[string]string{credentials.EnvCAFile: name}[k]
	}}
	if _, err := src.Roots(); err == nil || !strings.Contains(err.Error(), "DEPOT_CA_FILE") {
		t.Errorf("a missing file: %v", err)
	}
	if err := os.WriteFile(name, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := src.Roots(); err == nil || !strings.Contains(err.Error(), "no certificate") {
		t.Errorf("a file without certificates: %v", err)
	}
}
