package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/moby/buildkit/client"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/api/depot/v1/depotv1connect"
	"github.com/opendepot/depot/e2e/site"
	"github.com/opendepot/depot/internal/mtls"
)

// lease is a simulated driver's: a real key, CSR, lease and connection.
type lease struct {
	id       string
	key      *mtls.Key
	identity *mtls.Identity
	anchors  *mtls.Anchors
	endpoint *depotv1.Endpoint
	builder  depotv1connect.BuilderServiceClient
}

// acquire asks for a machine of the token's project until the lease is ready.
func acquire(ctx context.Context, builder depotv1connect.BuilderServiceClient) (*lease, error) {
	var random [16]byte
	_, _ = rand.Read(random[:]) // never fails: see crypto/rand
	l := &lease{id: "lse_" + hex.EncodeToString(random[:]), builder: builder}
	var err error
	if l.key, err = mtls.NewKey(); err != nil {
		return nil, err
	}
	csr, err := l.key.CSR()
	if err != nil {
		return nil, err
	}
	req := &depotv1.AcquireLeaseRequest{
		LeaseId: l.id, Arch: site.NativeArch(), Csr: csr, Launch: true,
	}
	for {
		resp, err := builder.AcquireLease(ctx, req)
		switch {
		case err != nil:
			return nil, err
		case resp.GetState() == depotv1.LeaseState_LEASE_STATE_ENDED:
			return nil, fmt.Errorf("lease ended: %s", resp.GetReason())
		case resp.GetState() == depotv1.LeaseState_LEASE_STATE_READY:
			l.endpoint = resp.GetEndpoint()
			if l.identity, err = mtls.NewIdentity(l.key, resp.GetCertificate().GetChain()); err != nil {
				return nil, err
			}
			l.anchors, err = mtls.NewAnchors(l.endpoint.GetTrustAnchors())
			return l, err
		}
	}
}

// dial connects to the lease's machine and completes the handshake.
func (l *lease) dial(ctx context.Context, n *site.Netns) (net.Conn, error) {
	raw, err := n.Dial(ctx, "tcp", l.endpoint.GetAddress())
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, mtls.Client{
		Identity: l.identity, Anchors: l.anchors, ServerName: l.endpoint.GetServerName(), NextProtos: []string{"h2"},
	}.Config())
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, err
	}
	return conn, nil
}

// answer completes one ListWorkers call on the machine.
func (l *lease) answer(ctx context.Context, n *site.Netns) error {
	c, err := client.New(ctx, "tcp://"+l.endpoint.GetAddress(), client.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return l.dial(ctx, n)
	}))
	if err != nil {
		return err
	}
	defer c.Close() //nolint:errcheck // nothing was written
	_, err = c.ListWorkers(ctx)
	return err
}

func (l *lease) release(ctx context.Context) error {
	_, err := l.builder.ReleaseLease(ctx, &depotv1.ReleaseLeaseRequest{LeaseId: l.id})
	return err
}

// keep renews the lease until ctx ends.
func (l *lease) keep(ctx context.Context) {
	for ctx.Err() == nil {
		if _, err := l.builder.RenewLease(ctx, &depotv1.RenewLeaseRequest{LeaseId: l.id, Wait: true}); err != nil {
			return
		}
	}
}

// files makes a key and a certificate outside the driver, and writes them
// as files for buildx's remote driver, which has no other way to be told.
func (l *lease) files(tb site.TB, dir string) (ca, cert, key string) {
	tb.Helper()
	ca, cert, key = filepath.Join(dir, "ca.pem"), filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	write := func(path, kind string, ders ...[]byte) {
		var b []byte
		for _, der := range ders {
			b = append(b, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})...)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			tb.Fatalf("%v", err)
		}
	}
	csr, der := fileKey(tb)
	resp, err := l.builder.RenewLease(tb.Context(), &depotv1.RenewLeaseRequest{LeaseId: l.id, Csr: csr})
	if err != nil {
		tb.Fatalf("certificate for the remote driver: %v", err)
	}
	write(ca, "CERTIFICATE", l.endpoint.GetTrustAnchors()...)
	write(cert, "CERTIFICATE", resp.GetCertificate().GetChain()...)
	write(key, "PRIVATE KEY", der)
	return ca, cert, key
}

// seconds is a duration as a figure.
func seconds(d time.Duration) float64 { return d.Seconds() }
