package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/opendepot/depot/controlplane"
	"github.com/opendepot/depot/controlplane/ca"
	"github.com/opendepot/depot/internal/mtls"
)

// ownServerName is the name by which pinned clients know the control plane.
const ownServerName = "depot-controlplane"

// ownLifetime is how long the control plane's own certificate is good for.
const ownLifetime = 30 * 24 * time.Hour

// certificate is what a listener shows, kept fresh while it serves.
type certificate struct {
	identity *mtls.Identity
	// refresh puts a newer certificate into identity if there is one.
	refresh func() error
}

// ownCertificate returns the control plane's own: its key is made at each
// start and stays in memory, and it is signed anew at half of its life.
func ownCertificate(ctx context.Context, authority *ca.Authority, record controlplane.Server, names []string, now func() time.Time) (certificate, error) {
	leaf := controlplane.Leaf{Usage: controlplane.UsageServer, DNSNames: []string{ownServerName, "localhost"}, IPs: []string{"127.0.0.1", "::1"}}
	for _, n := range names {
		if net.ParseIP(n) != nil {
			leaf.IPs = append(leaf.IPs, n)
		} else {
			leaf.DNSNames = append(leaf.DNSNames, n)
		}
	}
	key, err := mtls.NewKey()
	if err != nil {
		return certificate{}, err
	}
	if leaf.CSR, err = key.CSR(); err != nil {
		return certificate{}, err
	}
	c := certificate{identity: new(mtls.Identity)}
	var renew time.Time
	c.refresh = func() error {
		if now().Before(renew) {
			return nil
		}
		leaf.NotBefore, leaf.NotAfter = now().Add(-time.Hour), now().Add(ownLifetime)
		issued, err := authority.Sign(ctx, record.TLS, record.ID, leaf)
		if err != nil {
			return fmt.Errorf("sign the control plane's own certificate: %w", err)
		}
		renew = now().Add(ownLifetime / 2)
		return c.identity.Install(key, issued.Chain)
	}
	return c, c.refresh()
}

// fileCertificate returns one that stands in files, read again as they change.
func fileCertificate(cert, key string) (certificate, error) {
	c := certificate{identity: new(mtls.Identity)}
	c.refresh = func() error {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return fmt.Errorf("--tls-cert %s, --tls-key %s: %w", cert, key, err)
		}
		return c.identity.Set(pair)
	}
	return c, c.refresh()
}

// keepFresh refreshes the certificates once a minute. One that cannot be
// refreshed stays as it is, and the log says why.
func keepFresh(ctx context.Context, log *slog.Logger, certificates ...certificate) error {
	tick := time.NewTicker(time.Minute)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			for _, c := range certificates {
				if err := c.refresh(); err != nil {
					log.ErrorContext(ctx, "refresh a listener's certificate", "err", err)
				}
			}
		}
	}
}
