package credentials

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opendepot/depot/controlplane/client"
	"github.com/zalando/go-keyring"
)

// ErrNotFound means that no login is stored for the server, or none at all.
var ErrNotFound = errors.New("no login is stored")

// keyringService is the name that people see in their keyring's listing.
const keyringService = "depot"

// Login is what is known of one server.
type Login struct {
	// URL is the server's, in the form that client.ParseURL gives.
	URL string
	// Token is the user's.
	Token client.Token
	// Project is the default project, as "organization/project"; empty if none
	// was chosen.
	Project string
	// InKeyring tells where Save put the token: the keyring, or the file.
	InKeyring bool
}

// Store keeps logins in a directory of its own. Two processes that save at the
// same time lose nothing but the earlier of the two logins to the same server.
type Store struct {
	// Dir returns where logins.json is; it is asked late, because the Docker
	// CLI's own flags move it. It is made when needed, with mode 0700.
	Dir func() string
	// NoKeyring keeps tokens in the file though there may be a keyring.
	NoKeyring bool
}

// file is logins.json.
type file struct {
	// Current is the URL of the server that was logged in to last.
	Current string           `json:"current,omitempty"`
	Servers map[string]entry `json:"servers,omitempty"`
}

type entry struct {
	Project string `json:"project,omitempty"`
	// Token is empty if the token is in the keyring.
	Token string `json:"token,omitempty"`
}

// Save stores a login, replaces an older one of the same server, and makes it
// the current one. It returns the login with InKeyring set.
func (s Store) Save(l Login) (Login, error) {
	f, err := s.read()
	if err != nil {
		return l, err
	}
	e := entry{Project: l.Project}
	l.InKeyring = !s.NoKeyring && keyring.Set(keyringService, l.URL, l.Token.Secret()) == nil
	if !l.InKeyring {
		e.Token = l.Token.Secret()
	}
	if f.Servers == nil {
		f.Servers = map[string]entry{}
	}
	f.Servers[l.URL], f.Current = e, l.URL
	return l, s.write(f)
}

// Current returns the login of the server that was logged in to last, or
// ErrNotFound. Its token is not read: see Load.
func (s Store) Current() (Login, error) {
	f, err := s.read()
	if err != nil {
		return Login{}, err
	}
	e, ok := f.Servers[f.Current]
	if !ok {
		return Login{}, ErrNotFound
	}
	return Login{URL: f.Current, Project: e.Project, InKeyring: e.Token == ""}, nil
}

// Load returns the login of a server with its token, or ErrNotFound.
func (s Store) Load(url string) (Login, error) {
	f, err := s.read()
	if err != nil {
		return Login{}, err
	}
	e, ok := f.Servers[url]
	if !ok {
		return Login{}, ErrNotFound
	}
	l := Login{URL: url, Project: e.Project, InKeyring: e.Token == ""}
	text := e.Token
	if l.InKeyring {
		text, err = keyring.Get(keyringService, url)
		switch {
		case errors.Is(err, keyring.ErrNotFound):
			return Login{}, fmt.Errorf("the login to %s has no token in the keyring: %w", url, ErrNotFound)
		case err != nil:
			return Login{}, fmt.Errorf("read the token for %s from the keyring: %w: unlock the keyring, or set DEPOT_TOKEN", url, err)
		}
	}
	if l.Token, err = client.ParseToken(text); err != nil {
		return Login{}, fmt.Errorf("stored login to %s: %w", url, err)
	}
	return l, nil
}

// SetProject changes the project of a login, and nothing else: neither its
// token nor which login is the current one. ErrNotFound if there is no login
// to that server.
func (s Store) SetProject(url, project string) error {
	f, err := s.read()
	if err != nil {
		return err
	}
	e, ok := f.Servers[url]
	if !ok {
		return ErrNotFound
	}
	if e.Project == project {
		return nil
	}
	e.Project = project
	f.Servers[url] = e
	return s.write(f)
}

// Project returns the project of a login, empty if it has none, or
// ErrNotFound. Unlike Load it needs no keyring.
func (s Store) Project(url string) (string, error) {
	f, err := s.read()
	if err != nil {
		return "", err
	}
	e, ok := f.Servers[url]
	if !ok {
		return "", ErrNotFound
	}
	return e.Project, nil
}

// Delete forgets the login of a server; ErrNotFound if there is none.
func (s Store) Delete(url string) error {
	f, err := s.read()
	if err != nil {
		return err
	}
	e, ok := f.Servers[url]
	if !ok {
		return ErrNotFound
	}
	if e.Token == "" {
		if err := keyring.Delete(keyringService, url); err != nil && !errors.Is(err, keyring.ErrNotFound) {
			return fmt.Errorf("remove the token for %s from the keyring: %w", url, err)
		}
	}
	delete(f.Servers, url)
	if f.Current == url {
		f.Current = ""
	}
	return s.write(f)
}

func (s Store) path() string { return filepath.Join(s.Dir(), "logins.json") }

func (s Store) read() (file, error) {
	var f file
	data, err := os.ReadFile(s.path())
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return f, nil
	case err != nil:
		return f, fmt.Errorf("read stored logins: %w", err)
	}
	if err := json.Unmarshal(data, &f); err != nil {
		return f, fmt.Errorf("stored logins in %s are damaged: %w: remove the file and run `docker depot login`", s.path(), err)
	}
	return f, nil
}

// write replaces the file as a whole, so that a reader never sees a half.
func (s Store) write(f file) error {
	data, err := json.MarshalIndent(f, "", "\t")
	if err != nil {
		return fmt.Errorf("store logins: %w", err)
	}
	if err := os.MkdirAll(s.Dir(), 0o700); err != nil {
		return fmt.Errorf("store logins: %w", err)
	}
	tmp, err := os.CreateTemp(s.Dir(), "logins-*") // mode 0600
	if err != nil {
		return fmt.Errorf("store logins: %w", err)
	}
	_, err = tmp.Write(append(data, '\n'))
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), s.path())
	}
	if err != nil {
		return fmt.Errorf("store logins: %w", errors.Join(err, os.Remove(tmp.Name())))
	}
	return nil
}
