package credentials

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opendepot/depot/controlplane/client"
)

// The environment variables that are read.
const (
	EnvURL     = "DEPOT_API_URL"    // the server's URL
	EnvToken   = "DEPOT_TOKEN"      // the caller's token
	EnvProject = "DEPOT_PROJECT_ID" // a project's id, or organization/project
	EnvCAFile  = "DEPOT_CA_FILE"    // PEM; authorities to trust instead of the system's
)

// projectFile is what a checkout says about its project.
const projectFile = "depot.json"

// Source resolves servers, projects and tokens.
type Source struct {
	// Env looks up an environment variable; empty means unset.
	Env func(string) string
	// Dir is where the search for depot.json starts, going up.
	Dir string
	// Store has the stored logins.
	Store Store
}

// Server returns the URL of the server to use where none is named:
// DEPOT_API_URL, else that of the current login.
func (s Source) Server() (string, error) {
	if text := s.Env(EnvURL); text != "" {
		u, err := client.ParseURL(text)
		if err != nil {
			return "", fmt.Errorf("%s: %w", EnvURL, err)
		}
		return u.String(), nil
	}
	l, err := s.Store.Current()
	if errors.Is(err, ErrNotFound) {
		return "", fmt.Errorf("no depot server is known: run `docker depot login https://host`, or set %s", EnvURL)
	}
	return l.URL, err
}

// Project returns the project to use on a server where none is named, by id,
// by "organization/project" or by its plain name: DEPOT_PROJECT_ID, else the
// nearest depot.json, else the stored login's. Empty means that of the token.
func (s Source) Project(server string) (string, error) {
	if p := s.Env(EnvProject); p != "" {
		return p, nil
	}
	p, err := nearestProject(s.Dir)
	if p != "" || err != nil {
		return p, err
	}
	l, err := s.Store.Current()
	if errors.Is(err, ErrNotFound) || err == nil && l.URL != server {
		return "", nil
	}
	return l.Project, err
}

// Token returns the token for a server: DEPOT_TOKEN, else the stored login's.
func (s Source) Token(server string) (client.Token, error) {
	if text := s.Env(EnvToken); text != "" {
		t, err := client.ParseToken(text)
		if err != nil {
			return t, fmt.Errorf("%s: %w", EnvToken, err)
		}
		return t, nil
	}
	l, err := s.Store.Load(server)
	if errors.Is(err, ErrNotFound) {
		return client.Token{}, fmt.Errorf("not logged in to %s: run `docker depot login %s`, or set %s", server, server, EnvToken)
	}
	return l.Token, err
}

// Config returns how to connect to a server as the caller.
func (s Source) Config(server string) (client.Config, error) {
	token, err := s.Token(server)
	if err != nil {
		return client.Config{}, err
	}
	cfg := client.Config{URL: server, Token: token}
	cfg.Roots, err = s.Roots()
	return cfg, err
}

// Roots returns the authorities of DEPOT_CA_FILE; nil, meaning the system's,
// if that is not set.
func (s Source) Roots() (*x509.CertPool, error) {
	name := s.Env(EnvCAFile)
	if name == "" {
		return nil, nil //nolint:nilnil // crypto/tls takes nil for the system's roots
	}
	pem, err := os.ReadFile(name) //nolint:gosec // the user names the file
	if err != nil {
		return nil, fmt.Errorf("%s: %w", EnvCAFile, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: %s holds no certificate in PEM form", EnvCAFile, name)
	}
	return pool, nil
}

// nearestProject returns the id in the depot.json of dir or the nearest parent
// that has one; empty if none has.
func nearestProject(dir string) (string, error) {
	for {
		name := filepath.Join(dir, projectFile)
		data, err := os.ReadFile(name) //nolint:gosec // a fixed name in the user's own tree
		switch {
		case err == nil:
			return parseProject(name, data)
		case !errors.Is(err, fs.ErrNotExist):
			return "", fmt.Errorf("read the project: %w", err)
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", nil
		}
		dir = parent
	}
}

func parseProject(name string, data []byte) (string, error) {
	var content struct {
		ID *string `json:"id"`
	}
	if err := json.Unmarshal(data, &content); err != nil {
		return "", fmt.Errorf("%s is not valid: %w: it should read {\"id\": \"<project>\"}", name, err)
	}
	if content.ID == nil || *content.ID == "" {
		return "", fmt.Errorf("%s names no project: it should read {\"id\": \"<project>\"}", name)
	}
	return *content.ID, nil
}
