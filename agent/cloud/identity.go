package cloud

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/internal/mtls"
)

// The types of the blocks in the identity file.
const (
	keyBlock         = "PRIVATE KEY"
	certificateBlock = "CERTIFICATE"
)

// loadKey returns the agent's key and certificate chain, making and storing a
// key where there is none: the key is kept before it is used, so that a Join
// whose answer was lost can be repeated with it. The chain is empty before the
// first Join. The key never leaves this host (keys-stay).
func (s *State) loadKey() (tls.Certificate, error) {
	path := filepath.Join(s.dir, identityFile)
	text, err := os.ReadFile(path) //nolint:gosec // the directory is the operator's choice
	if errors.Is(err, os.ErrNotExist) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return tls.Certificate{}, fmt.Errorf("make the agent's key: %w", err)
		}
		c := tls.Certificate{PrivateKey: key}
		return c, s.storeIdentity(c)
	}
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("read the agent's identity: %w", err)
	}
	c, err := parseIdentity(text)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("%s is damaged (%w): restore it, or remove it and join again with a new token", path, err)
	}
	return c, nil
}

func parseIdentity(text []byte) (tls.Certificate, error) {
	var c tls.Certificate
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		switch block.Type {
		case keyBlock:
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return c, fmt.Errorf("parse key: %w", err)
			}
			c.PrivateKey = key
		case certificateBlock:
			c.Certificate = append(c.Certificate, block.Bytes)
		}
	}
	if _, ok := c.PrivateKey.(*ecdsa.PrivateKey); !ok {
		return c, errors.New("it holds no ECDSA key")
	}
	return c, nil
}

// storeIdentity replaces the identity file.
func (s *State) storeIdentity(c tls.Certificate) error {
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		return fmt.Errorf("store the agent's identity: %w", err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: keyBlock, Bytes: der})
	for _, cert := range c.Certificate {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: certificateBlock, Bytes: cert})...)
	}
	return s.write(identityFile, text)
}

// request returns a certificate request for c's key.
func request(c tls.Certificate) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, c.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("make certificate request: %w", err)
	}
	return der, nil
}

// identity is who the agent is to its control plane.
type identity struct {
	state   *State
	key     tls.Certificate // its Certificate is what was last stored
	current *mtls.Identity  // what handshakes show
}

// openIdentity reads the identity from the state directory.
func openIdentity(s *State) (*identity, error) {
	c, err := s.loadKey()
	if err != nil {
		return nil, err
	}
	i := &identity{state: s, key: c, current: &mtls.Identity{}}
	if len(c.Certificate) > 0 {
		if err := i.current.Set(c); err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(s.dir, identityFile), err)
		}
	}
	return i, nil
}

// install makes chain the agent's certificate: checked, stored, then shown.
func (i *identity) install(issued *depotv1.Certificate) error {
	c := tls.Certificate{PrivateKey: i.key.PrivateKey, Certificate: issued.GetChain()}
	if err := new(mtls.Identity).Set(c); err != nil {
		return err
	}
	if err := i.state.storeIdentity(c); err != nil {
		return err
	}
	i.key = c
	return i.current.Set(c)
}

// usable reports whether there is a certificate that has not expired.
func (i *identity) usable(now time.Time) bool {
	leaf := i.current.Leaf()
	return leaf != nil && now.Before(leaf.NotAfter)
}

// renewAt is when half of the certificate's lifetime has passed.
func (i *identity) renewAt() time.Time {
	leaf := i.current.Leaf()
	return leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2)
}

// join makes the agent known to its control plane, unless it is already. It
// repeats until the server is reached; a refusal is final.
func (a *Agent) join(ctx context.Context) error {
	if a.identity.usable(time.Now()) && a.obeys.ServerID != "" {
		return nil
	}
	if a.cfg.Token.IsZero() {
		if leaf := a.identity.current.Leaf(); leaf != nil {
			return fmt.Errorf("the certificate of this agent expired at %s: start the agent once more with the token that it joined with, "+
				"which is good for its key; if that is lost, with one of `docker depot agent token`", leaf.NotAfter.UTC().Format(time.RFC3339))
		}
		return errors.New("this agent has not joined a control plane yet: run `docker depot agent token` and give the token in --token-file or DEPOT_AGENT_TOKEN")
	}
	csr, err := request(a.identity.key)
	if err != nil {
		return err
	}
	for failures := 0; ; failures++ {
		err := a.joinOnce(ctx, csr)
		if err == nil || ctx.Err() != nil {
			return nil //nolint:nilerr // to be told to end is no error
		}
		if !retryable(err) {
			return fmt.Errorf("join the control plane: %w", err)
		}
		a.log.WarnContext(ctx, "join", "err", err)
		a.pause(ctx, failures)
	}
}

func (a *Agent) joinOnce(ctx context.Context, csr []byte) error {
	resp, err := a.client.Agent.Join(ctx, &depotv1.JoinRequest{Token: a.cfg.Token.Secret(), Csr: csr, Name: a.cfg.Name})
	if err != nil {
		return err
	}
	if known := a.obeys.ServerID; known != "" && known != resp.GetServerId() {
		return a.foreign(resp.GetServerId())
	}
	if !validID("srv", resp.GetServerId()) || !validID("agt", resp.GetAgentId()) {
		return fmt.Errorf("the control plane answered with the ids %q and %q: check its version", resp.GetServerId(), resp.GetAgentId())
	}
	obeys := controlPlane{ServerID: resp.GetServerId(), Epoch: a.obeys.Epoch, AgentID: resp.GetAgentId(), Pin: a.cfg.Token.Pin()}
	// In this order: an identity without its control plane would join anew.
	if err := a.state.setControlPlane(obeys); err != nil {
		return err
	}
	a.obeys = obeys
	if err := a.identity.install(resp.GetIdentity()); err != nil {
		return err
	}
	if err := a.reconnect(); err != nil {
		return err
	}
	a.log.InfoContext(ctx, "joined", "server", obeys.ServerID, "agent", obeys.AgentID)
	return nil
}

// foreign is the refusal of another control plane.
func (a *Agent) foreign(got string) error {
	return &RefusedError{fmt.Sprintf("the control plane at %s is %s, but this agent belongs to %s: check --server; "+
		"to hand this host over, stop the machines, and start the agent with an empty --state-dir and a new token",
		a.client.URL(), got, a.obeys.ServerID)}
}

// keepIdentity renews the certificate at half of its lifetime; it returns when
// it wants to be asked again. Calls go on with the old one meanwhile.
func (l *loop) keepIdentity(ctx context.Context, now time.Time) time.Time {
	due := l.identity.renewAt()
	if due.Before(l.nextRenewal) {
		due = l.nextRenewal
	}
	if l.renewing || now.Before(due) {
		return due
	}
	l.renewing = true
	c, key := l.client, l.identity.key
	l.begin(func() func(time.Time) {
		issued, err := renew(ctx, c, key)
		return func(now time.Time) {
			l.renewing = false
			if err == nil {
				err = l.identity.install(issued)
			}
			switch {
			case ctx.Err() != nil:
			case err != nil:
				l.log.WarnContext(ctx, "renew the agent's certificate", "err", err)
				l.nextRenewal = now.Add(backoff(l.renewals, actWait, jitter()))
				l.renewals++
			default:
				l.log.InfoContext(ctx, "renewed the agent's certificate", "expires", l.identity.current.Leaf().NotAfter)
				l.nextRenewal, l.renewals, l.outdated = now.Add(firstWait), 0, true
			}
		}
	})
	return time.Time{}
}

func renew(ctx context.Context, c *client.Client, key tls.Certificate) (*depotv1.Certificate, error) {
	csr, err := request(key)
	if err != nil {
		return nil, err
	}
	resp, err := c.Agent.RenewIdentity(ctx, &depotv1.RenewIdentityRequest{Csr: csr})
	return resp.GetIdentity(), err
}

// retryable reports whether err may pass by itself: the server is away, or it
// failed for a reason of its own.
func retryable(err error) bool {
	if client.Temporary(err) {
		return true
	}
	switch connect.CodeOf(err) {
	case connect.CodeInternal, connect.CodeResourceExhausted, connect.CodeAborted:
		return true
	default:
		return false
	}
}
