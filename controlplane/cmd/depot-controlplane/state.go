package main

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/opendepot/depot/controlplane"
	"github.com/opendepot/depot/controlplane/auth"
	"github.com/opendepot/depot/controlplane/ca"
	"github.com/opendepot/depot/controlplane/store"
	"github.com/opendepot/depot/internal/mtls"
)

// databaseName is the database's file in the data directory.
const databaseName = "depot.db"

// openStore opens the database of the data directory, which it makes.
func openStore(ctx context.Context, c *config, log store.Config) (*store.Store, error) {
	if err := os.MkdirAll(c.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("make the data directory: %w", err)
	}
	log.Path = filepath.Join(c.DataDir, databaseName)
	return store.Open(ctx, log)
}

// begin raises the epoch and returns the control plane's record, made at the
// first start. What was known of agents' connections is forgotten.
func begin(ctx context.Context, s controlplane.Store, authority *ca.Authority, org string, now time.Time) (record controlplane.Server, first bool, err error) {
	fresh, err := newRecord(authority, now)
	if err != nil {
		return record, false, err
	}
	err = s.Update(ctx, func(tx controlplane.Tx) (err error) {
		first = false
		record, err = tx.Server(ctx)
		switch {
		case controlplane.CodeOf(err) == controlplane.NotFound:
			first, record = true, fresh
			o := controlplane.Organization{ID: controlplane.NewID(controlplane.KindOrganization, now, rand.Reader), Name: org, Created: now}
			if err := o.Validate(); err != nil {
				return err
			}
			if err := tx.PutOrganization(ctx, o); err != nil {
				return err
			}
		case err != nil:
			return err
		}
		record.Epoch++
		agents, err := tx.Agents(ctx)
		if err != nil {
			return err
		}
		for _, a := range agents {
			a.Connected = false
			if err := tx.PutAgent(ctx, a); err != nil {
				return err
			}
		}
		return tx.PutServer(ctx, record)
	})
	return record, first, err
}

func newRecord(authority *ca.Authority, now time.Time) (controlplane.Server, error) {
	r := controlplane.Server{ID: controlplane.NewID(controlplane.KindServer, now, rand.Reader), Created: now}
	var err error
	if r.Agents, err = authority.NewAuthority(r.ID, "depot agents "+r.ID); err != nil {
		return r, err
	}
	if r.TLS, err = authority.NewAuthority(r.ID, "depot control plane "+r.ID); err != nil {
		return r, err
	}
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails: see crypto/rand
	r.JoinKey, err = authority.Seal(r.ID, key)
	return r, err
}

// pinOf returns the pin of the control plane's own authority.
func pinOf(r controlplane.Server) (string, error) {
	cert, err := x509.ParseCertificate(r.TLS.Certificate)
	if err != nil {
		return "", fmt.Errorf("read the control plane's own certificate: %w", err)
	}
	return mtls.PinOf(cert), nil
}

// writeAdminToken makes the first administrator's token, once. A start that
// was interrupted before the file was there makes another.
func writeAdminToken(ctx context.Context, s controlplane.Store, a *auth.Authenticator, path string, now time.Time) error {
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	token, text, err := a.NewToken(controlplane.Token{Kind: controlplane.TokenUser, Name: "first administrator", Role: controlplane.RoleAdmin}, now)
	if err != nil {
		return err
	}
	err = s.Update(ctx, func(tx controlplane.Tx) error { return tx.PutToken(ctx, token) })
	if err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(text+"\n"), 0o600); err != nil {
		return fmt.Errorf("write the administrator's token: %w", err)
	}
	return os.Rename(tmp, path)
}
