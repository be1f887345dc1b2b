// Package auth turns credentials into principals: bearer tokens, which are
// stored by their hash only, and the join tokens of machines, which are not
// stored at all.
//
// A token reads depot_<kind>_<id>_<secret>, so that scanners of source code
// find one that leaked. The secret is 32 random bytes in base32, followed by
// the server's pin where the server has a certificate of its own making: the
// token and the URL then suffice to reach it safely.
package auth

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/opendepot/depot/controlplane"
)

// usedEvery is how precisely the last use of a token is recorded: a write per
// call would make every read of the API a write to the store.
const usedEvery = time.Minute

// Config is what an [Authenticator] works with.
type Config struct {
	Store controlplane.Store
	// Pin is the server's pin, 52 characters; empty if its certificate is
	// checked against the system's roots.
	Pin string
	// Random is the source of ids and secrets.
	Random io.Reader
	// Logger is told what keeps nobody out; it must be set.
	Logger *slog.Logger
}

// Authenticator implements [controlplane.Authenticator] over a store.
type Authenticator struct {
	store  controlplane.Store
	pin    string
	random io.Reader
	log    *slog.Logger
}

var _ controlplane.Authenticator = (*Authenticator)(nil)

// New returns an Authenticator. It fails if the pin has not the form of one, or
// if a part is missing.
func New(c Config) (*Authenticator, error) {
	if c.Pin != "" && (len(c.Pin) != pinLength || !consistsOf(c.Pin, base32Digits)) {
		return nil, fmt.Errorf("the server's pin %q is not one: expected %d characters of base32 in lower case", c.Pin, pinLength)
	}
	if c.Store == nil || c.Random == nil || c.Logger == nil {
		return nil, errors.New("an authenticator needs a store, a source of randomness and a log")
	}
	return &Authenticator{store: c.Store, pin: c.Pin, random: c.Random, log: c.Logger}, nil
}

// Token authenticates the bearer of a user's or project's token. Its errors are
// Unauthenticated, except for those of the store.
func (a *Authenticator) Token(ctx context.Context, text string, now time.Time) (controlplane.Principal, error) {
	none := controlplane.Principal{}
	p, err := parse(text)
	if err != nil {
		return none, err
	}
	if p.kind == controlplane.TokenAgent {
		return none, controlplane.Errorf(controlplane.Unauthenticated,
			"an agent token lets one agent join, and opens nothing else: log in, or use a token of `docker depot token create`")
	}
	t, org, err := a.check(ctx, p, now)
	if err != nil {
		return none, err
	}
	if err := a.touch(ctx, t, now); err != nil {
		return none, err
	}
	return principal(t, org), nil
}

// AgentToken checks the text of an agent token and returns the stored token.
// Binding it to one key is the caller's part. Its errors are Unauthenticated,
// except for those of the store.
func (a *Authenticator) AgentToken(ctx context.Context, text string, now time.Time) (controlplane.Token, error) {
	none := controlplane.Token{}
	p, err := parse(text)
	if err != nil {
		return none, err
	}
	if p.kind != controlplane.TokenAgent {
		return none, controlplane.Errorf(controlplane.Unauthenticated,
			"this is a %s token, which lets no agent join: make one with `docker depot agent token`", p.kind)
	}
	t, _, err := a.check(ctx, p, now)
	return t, err
}

// check finds the stored token that p presents, and the organization that a
// project token belongs to. Whoever does not know the secret learns nothing:
// unknown and wrong get one answer.
func (a *Authenticator) check(ctx context.Context, p presented, now time.Time) (t controlplane.Token, org string, err error) {
	none := controlplane.Token{}
	err = a.store.View(ctx, func(tx controlplane.Tx) error {
		if t, err = tx.Token(ctx, p.id); err != nil {
			return err
		}
		org = t.Org
		if t.Project == "" {
			return nil
		}
		project, err := tx.Project(ctx, t.Project)
		org = project.Org
		return err
	})
	if err != nil && controlplane.CodeOf(err) != controlplane.NotFound {
		return none, "", fmt.Errorf("look up token %s: %w", p.id, err)
	}
	// Also after NotFound, where t has no hash: the time tells no difference.
	got := p.secret.hash()
	same := subtle.ConstantTimeCompare(got[:], t.Hash) == 1
	switch {
	case err != nil || !same || t.Kind != p.kind:
		return none, "", controlplane.Errorf(controlplane.Unauthenticated,
			"the token is not known to this server: it was removed, is for another server, or is damaged; log in again, or use a new token")
	case t.Expired(now):
		return none, "", controlplane.Errorf(controlplane.Unauthenticated,
			"the token %q expired on %s: log in again, or use a new token", t.Name, t.Expires.UTC().Format(time.RFC3339))
	}
	return t, org, nil
}

// touch records the use of a token. A store that cannot write now does not lock
// anybody out; a token that was removed in between does.
func (a *Authenticator) touch(ctx context.Context, t controlplane.Token, now time.Time) error {
	if now.Sub(t.Used) < usedEvery {
		return nil
	}
	err := a.store.Update(ctx, func(tx controlplane.Tx) error {
		t, err := tx.Token(ctx, t.ID)
		if err != nil || now.Sub(t.Used) < usedEvery {
			return err
		}
		t.Used = now
		return tx.PutToken(ctx, t)
	})
	switch {
	case controlplane.CodeOf(err) == controlplane.NotFound:
		return controlplane.Errorf(controlplane.Unauthenticated, "the token %q was removed: log in again, or use a new token", t.Name)
	case err != nil && ctx.Err() == nil:
		a.log.WarnContext(ctx, "record the use of a token", "token", t.ID, "err", err)
	}
	return nil
}

func principal(t controlplane.Token, org string) controlplane.Principal {
	kind := controlplane.PrincipalUser
	if t.Kind == controlplane.TokenProject {
		kind = controlplane.PrincipalProject
	}
	return controlplane.Principal{
		Kind: kind, ID: t.ID, Name: t.Name,
		Org: org, Project: t.Project, Role: t.Role, Expires: t.Expires,
	}
}

// NewToken completes t with its id, hash and time, to be stored, and returns
// the text that carries its secret: nobody can show it again.
func (a *Authenticator) NewToken(t controlplane.Token, now time.Time) (controlplane.Token, string, error) {
	if !knownKind(t.Kind) {
		return controlplane.Token{}, "", fmt.Errorf("make a token: unknown kind %q", t.Kind)
	}
	if (t.Kind == controlplane.TokenProject) != (t.Project != "") {
		return controlplane.Token{}, "", fmt.Errorf("make a %s token: only a project token names a project, and it must", t.Kind)
	}
	random := make([]byte, sha256.Size)
	if _, err := io.ReadFull(a.random, random); err != nil {
		return controlplane.Token{}, "", fmt.Errorf("make a token: %w", err)
	}
	s := secret(base32Encoding().EncodeToString(random))
	hash := s.hash()
	t.ID = controlplane.NewID(controlplane.KindToken, now, a.random)
	t.Hash = hash[:]
	t.Created = now
	return t, presented{kind: t.Kind, id: t.ID, secret: s}.text(a.pin), nil
}
