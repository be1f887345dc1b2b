package machine

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/api/depot/v1/depotv1connect"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/internal/mtls"
)

const machineName = "machine.depot.internal"

// testID returns an id of the protocol's form.
func testID(kind, digit string) string { return kind + "_" + strings.Repeat(digit, 32) }

// authority is a small CA.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(tb testing.TB) *authority {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: tb.Name()},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return &authority{cert: cert, key: key}
}

// sign issues a leaf for public, as change says.
func (a *authority) sign(public any, change ...func(*x509.Certificate)) ([]byte, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
	}
	for _, c := range change {
		c(template)
	}
	return x509.CreateCertificate(rand.Reader, template, a.cert, public, a.key)
}

func forServer(name string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.ExtKeyUsage, c.DNSNames = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, []string{name}
	}
}

func forClient(c *x509.Certificate) {
	c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
}

func named(n mtls.LeafName) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.URIs = n.URIs() }
}

// identity makes a key and a certificate for it.
func (a *authority) identity(tb testing.TB, change ...func(*x509.Certificate)) *mtls.Identity {
	tb.Helper()
	key, err := mtls.NewKey()
	if err != nil {
		tb.Fatal(err)
	}
	leaf, err := a.sign(key.Public(), change...)
	if err != nil {
		tb.Fatal(err)
	}
	id, err := mtls.NewIdentity(key, [][]byte{leaf, a.cert.Raw})
	if err != nil {
		tb.Fatal(err)
	}
	return id
}

func (a *authority) anchors(tb testing.TB) *mtls.Anchors {
	tb.Helper()
	anchors, err := mtls.NewAnchors([][]byte{a.cert.Raw})
	if err != nil {
		tb.Fatal(err)
	}
	return anchors
}

// controlPlane speaks the machine's part of the protocol over real TLS on a
// relay's socket. What it answers is for the test to say.
type controlPlane struct {
	id      string
	project *authority // of clients and of the machine's front
	agents  *authority // of machines' identities
	server  *authority // of its own certificate
	life    time.Duration
	listen  string

	mu        sync.Mutex // guards all below
	changed   chan struct{}
	directive *depotv1.SyncMachineResponse
	settings  *depotv1.BuildkitSettings
	reports   []*depotv1.SyncMachineRequest
	syncErr   error
	registers int
	renewals  int
	regErr    error
	http      *http.Server
}

// newControlPlane makes one that listens on the relay's socket in runDir.
func newControlPlane(tb testing.TB, runDir string) *controlPlane {
	tb.Helper()
	c := makeControlPlane(tb, runDir)
	if err := os.MkdirAll(filepath.Dir(c.listen), 0o700); err != nil {
		tb.Fatal(err)
	}
	c.start(tb)
	tb.Cleanup(func() { c.stop() })
	return c
}

// makeControlPlane makes one that does not listen yet.
func makeControlPlane(tb testing.TB, runDir string) *controlPlane {
	tb.Helper()
	return &controlPlane{
		id:        testID("srv", "1"),
		project:   newAuthority(tb),
		agents:    newAuthority(tb),
		server:    newAuthority(tb),
		life:      time.Hour,
		listen:    filepath.Join(runDir, "relay", "controlplane.sock"),
		changed:   make(chan struct{}),
		directive: &depotv1.SyncMachineResponse{Revision: 1},
		settings:  &depotv1.BuildkitSettings{Arch: "amd64", Platforms: []string{"linux/amd64"}, CacheKeepSeconds: 3600, CacheBytes: 10 << 30},
	}
}

func (c *controlPlane) start(tb testing.TB) {
	tb.Helper()
	listener, err := net.Listen("unix", c.listen) //nolint:noctx // at once
	if err != nil {
		tb.Fatal(err)
	}
	c.serve(tb, listener)
}

func (c *controlPlane) serve(tb testing.TB, listener net.Listener) {
	tb.Helper()
	mux := http.NewServeMux()
	mux.Handle(depotv1connect.NewMachineServiceHandler(c))
	c.http = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: time.Minute,
		TLSConfig: mtls.Server{
			Identity: c.server.identity(tb, forServer(client.PinnedName), func(l *x509.Certificate) { l.NotAfter = time.Now().Add(9 * 24 * time.Hour) }), Anchors: c.agents.anchors(tb),
			Optional: true, NextProtos: []string{"h2"},
		}.Config(),
	}
	server := c.http
	go server.ServeTLS(listener, "", "") //nolint:errcheck // ends with stop
}

func (c *controlPlane) stop() { _ = c.http.Close() }

func (c *controlPlane) Register(_ context.Context, req *depotv1.RegisterRequest) (*depotv1.RegisterResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.registers++
	if c.regErr != nil {
		return nil, c.regErr
	}
	if req.GetJoinToken() != "join" {
		return nil, connect.NewError(connect.CodeUnauthenticated, nil)
	}
	front, identity, err := c.issue(req.GetMachineId(), req.GetCsr())
	if err != nil {
		return nil, err
	}
	return &depotv1.RegisterResponse{
		ServerCertificate: front, Identity: identity, TrustAnchors: [][]byte{c.project.cert.Raw},
		Buildkit: c.settings, ServerId: c.id,
	}, nil
}

func (c *controlPlane) issue(machine string, csr []byte) (front, identity *depotv1.Certificate, err error) {
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, nil, err
	}
	life := func(leaf *x509.Certificate) { leaf.NotAfter = time.Now().Add(c.life) }
	server, err := c.project.sign(req.PublicKey, forServer(machineName), life)
	if err != nil {
		return nil, nil, err
	}
	own, err := c.agents.sign(req.PublicKey, forClient, life, func(leaf *x509.Certificate) { leaf.Subject.CommonName = machine })
	if err != nil {
		return nil, nil, err
	}
	renew := timestamppb.New(time.Now().Add(c.life / 2))
	return &depotv1.Certificate{Chain: [][]byte{server}, RenewAfter: renew},
		&depotv1.Certificate{Chain: [][]byte{own}, RenewAfter: renew}, nil
}

func (c *controlPlane) RenewMachine(_ context.Context, req *depotv1.RenewMachineRequest) (*depotv1.RenewMachineResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.renewals++
	c.ring()
	front, identity, err := c.issue(req.GetMachineId(), req.GetCsr())
	if err != nil {
		return nil, err
	}
	return &depotv1.RenewMachineResponse{ServerCertificate: front, Identity: identity}, nil
}

func (c *controlPlane) SyncMachine(ctx context.Context, req *depotv1.SyncMachineRequest) (*depotv1.SyncMachineResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reports = append(c.reports, req)
	c.ring()
	deadline := time.After(25 * time.Second)
	for {
		if c.syncErr != nil {
			return nil, c.syncErr
		}
		if c.directive.GetRevision() != req.GetHaveRevision() {
			c.directive.ServerId = c.id
			return c.directive, nil
		}
		changed := c.changed
		c.mu.Unlock()
		select {
		case <-ctx.Done():
			c.mu.Lock()
			return nil, ctx.Err()
		case <-deadline:
			c.mu.Lock()
			return c.directive, nil
		case <-changed:
		}
		c.mu.Lock()
	}
}

// ring wakes all; the caller holds mu.
func (c *controlPlane) ring() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// direct gives a new directive.
func (c *controlPlane) direct(d *depotv1.SyncMachineResponse) {
	c.mu.Lock()
	defer c.mu.Unlock()
	d.Revision = c.directive.GetRevision() + 1
	c.directive = d
	c.ring()
}

// await waits until the latest report is as wanted.
func (c *controlPlane) await(tb testing.TB, what string, ok func(*depotv1.SyncMachineRequest) bool) *depotv1.SyncMachineRequest {
	tb.Helper()
	return c.awaitAny(tb, what, func() *depotv1.SyncMachineRequest {
		if n := len(c.reports); n > 0 && ok(c.reports[n-1]) {
			return c.reports[n-1]
		}
		return nil
	})
}

// awaitAny waits until get, called with mu held, returns something.
func (c *controlPlane) awaitAny(tb testing.TB, what string, get func() *depotv1.SyncMachineRequest) *depotv1.SyncMachineRequest {
	tb.Helper()
	timeout := time.After(30 * time.Second)
	for {
		c.mu.Lock()
		got, changed := get(), c.changed
		c.mu.Unlock()
		if got != nil {
			return got
		}
		select {
		case <-changed:
		case <-timeout:
			c.mu.Lock()
			defer c.mu.Unlock()
			var last *depotv1.SyncMachineRequest
			if n := len(c.reports); n > 0 {
				last = c.reports[n-1]
			}
			tb.Fatalf("not within 30 s: %s; %d reports, the last %v", what, len(c.reports), last)
		}
	}
}
