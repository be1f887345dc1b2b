package driver

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	bx "github.com/docker/buildx/driver"
	"github.com/docker/buildx/util/progress"
	control "github.com/moby/buildkit/api/services/control"
	types "github.com/moby/buildkit/api/types"
	bkclient "github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/api/depot/v1/depotv1connect"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/driver/credentials"
	"github.com/opendepot/depot/internal/mtls"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// authority is a certificate authority of the test's.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, key}
}

// sign returns a leaf for a public key.
func (a authority) sign(public any, usage x509.ExtKeyUsage, name string, uris []*url.URL) ([]byte, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{usage}, URIs: uris,
	}
	if name != "" {
		template.DNSNames = []string{name}
	}
	return x509.CreateCertificate(rand.Reader, template, a.cert, public, a.key)
}

// serverLeaf is a leaf for name with a key of its own.
func (a authority) serverLeaf(t *testing.T, name string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := a.sign(key.Public(), x509.ExtKeyUsageServerAuth, name, nil)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der, a.cert.Raw}, PrivateKey: key}
}

const (
	serverID    = "srv_00000000000000000000000000000001"
	machineName = "machine.test"
	mch1        = "mch_00000000000000000000000000000001"
	mch2        = "mch_00000000000000000000000000000002"
)

// machine is buildkitd's control service behind the machine's TLS.
type machine struct {
	control.UnimplementedControlServer
	id       string
	address  string
	listener net.Listener
	server   *grpc.Server
	solving  chan string // gets the ref of each solve that runs until it is cancelled
	// onConnect, if set, is called as a client connects, who is then turned away.
	onConnect atomic.Pointer[func()]
}

func (m *machine) Info(context.Context, *control.InfoRequest) (*control.InfoResponse, error) {
	return &control.InfoResponse{BuildkitVersion: &types.BuildkitVersion{Version: "v0.33.1"}}, nil
}

func (m *machine) Solve(ctx context.Context, req *control.SolveRequest) (*control.SolveResponse, error) {
	m.solving <- req.GetRef()
	<-ctx.Done()
	return nil, status.FromContextError(ctx.Err()).Err()
}

// Status hangs like that of a build that says nothing.
func (m *machine) Status(_ *control.StatusRequest, s control.Control_StatusServer) error {
	<-s.Context().Done()
	return nil
}

// kill ends the machine without a word.
func (m *machine) kill() { m.server.Stop() }

func newMachine(t *testing.T, project authority, id string) *machine {
	t.Helper()
	identity := new(mtls.Identity)
	if err := identity.Set(project.serverLeaf(t, machineName)); err != nil {
		t.Fatal(err)
	}
	anchors, err := mtls.NewAnchors([][]byte{project.cert.Raw})
	if err != nil {
		t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{id: id, address: l.Addr().String(), server: grpc.NewServer(), solving: make(chan string, 8)}
	m.listener = tls.NewListener(l, mtls.Server{
		Identity: identity, Anchors: anchors, NextProtos: []string{"h2"},
		Admit: func(leaf *x509.Certificate) error {
			if lose := m.onConnect.Load(); lose != nil {
				(*lose)()
				return errors.New("the machine is being lost")
			}
			name, err := mtls.ParseLeafName(leaf)
			if err == nil && name.Machine != id {
				err = errors.New("not this machine")
			}
			return err
		},
	}.Config())
	control.RegisterControlServer(m.server, m)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = m.server.Serve(m.listener)
	}()
	t.Cleanup(func() { m.server.Stop(); <-done })
	return m
}

// plane is a control plane with one project and one architecture.
type plane struct {
	depotv1connect.UnimplementedBuilderServiceHandler
	project authority

	mu       sync.Mutex
	arch     []*depotv1.Architecture
	waits    []string          // reasons to give before a lease is ready
	machines []*machine        // the next lease gets the first; the last stays
	ended    map[string]string // leases and why they ended
	cancel   []string          // refs to cancel
	change   chan struct{}     // closed when ended or cancel changes
	acquired []*depotv1.AcquireLeaseRequest
	released map[string]bool
	notices  []string
	refuse   error
}

func (p *plane) GetBuilder(_ context.Context, req *depotv1.GetBuilderRequest) (*depotv1.GetBuilderResponse, error) {
	if n := req.GetProject().GetName(); n != "web" && n != "" {
		return nil, connect.NewError(connect.CodeNotFound, errors.New(`project "acme/`+n+`" does not exist`))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return &depotv1.GetBuilderResponse{ProjectId: "prj_1", Project: "acme/web", Architectures: p.arch}, nil
}

func (p *plane) AcquireLease(ctx context.Context, req *depotv1.AcquireLeaseRequest) (*depotv1.AcquireLeaseResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.acquired = append(p.acquired, req)
	switch {
	case p.refuse != nil:
		return nil, p.refuse
	case len(p.machines) == 0 && !req.GetLaunch():
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("no machine is running"))
	case len(p.waits) > 0:
		reason := p.waits[0]
		p.waits = p.waits[1:]
		return &depotv1.AcquireLeaseResponse{State: depotv1.LeaseState_LEASE_STATE_WAITING, Reason: reason}, nil
	case len(p.machines) == 0:
		p.mu.Unlock()
		<-ctx.Done() // the pool is full
		p.mu.Lock()
		return nil, ctx.Err()
	}
	m := p.machines[0]
	if len(p.machines) > 1 {
		p.machines = p.machines[1:]
	}
	csr, err := x509.ParseCertificateRequest(req.GetCsr())
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	name := mtls.LeafName{Server: serverID, Lease: req.GetLeaseId(), Machine: m.id}
	leaf, err := p.project.sign(csr.PublicKey, x509.ExtKeyUsageClientAuth, "", name.URIs())
	if err != nil {
		return nil, err
	}
	return &depotv1.AcquireLeaseResponse{
		State: depotv1.LeaseState_LEASE_STATE_READY,
		Endpoint: &depotv1.Endpoint{
			MachineId: m.id, Address: m.address, ServerName: machineName, TrustAnchors: [][]byte{p.project.cert.Raw},
		},
		Certificate: &depotv1.Certificate{Chain: [][]byte{leaf}, RenewAfter: timestamppb.New(time.Now().Add(time.Hour))},
		ServerTime:  timestamppb.Now(),
		Notices:     p.notices,
	}, nil
}

func (p *plane) RenewLease(ctx context.Context, req *depotv1.RenewLeaseRequest) (*depotv1.RenewLeaseResponse, error) {
	for {
		p.mu.Lock()
		reason, over := p.ended[req.GetLeaseId()]
		refs, change := p.cancel, p.change
		p.cancel = nil
		p.mu.Unlock()
		switch {
		case over:
			return &depotv1.RenewLeaseResponse{State: depotv1.LeaseState_LEASE_STATE_ENDED, Reason: reason}, nil
		case len(refs) > 0 || !req.GetWait():
			return &depotv1.RenewLeaseResponse{State: depotv1.LeaseState_LEASE_STATE_READY, CancelRefs: refs}, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-change:
		}
	}
}

func (p *plane) ReleaseLease(_ context.Context, req *depotv1.ReleaseLeaseRequest) (*depotv1.ReleaseLeaseResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.released[req.GetLeaseId()] = true
	return &depotv1.ReleaseLeaseResponse{}, nil
}

// update changes the plane and wakes the calls that hang.
func (p *plane) update(fn func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fn()
	close(p.change)
	p.change = make(chan struct{})
}

// endAll ends all leases that were asked for until now.
func (p *plane) endAll(reason string) {
	p.update(func() {
		for _, a := range p.acquired {
			p.ended[a.GetLeaseId()] = reason
		}
	})
}

// held returns the ids of leases that were asked for and not released.
func (p *plane) held() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := map[string]bool{}
	var ids []string
	for _, a := range p.acquired {
		if id := a.GetLeaseId(); !p.released[id] && !seen[id] {
			seen[id] = true
			ids = append(ids, id)
		}
	}
	return ids
}

// world is a control plane, a factory that talks to it, and what was shown.
type world struct {
	*plane
	factory *Factory
	host    string
	env     map[string]string
	stderr  *transcript
	screen  screen
}

func newWorld(t *testing.T) *world {
	t.Helper()
	p := &plane{
		project: newAuthority(t), ended: map[string]string{}, released: map[string]bool{}, change: make(chan struct{}),
		arch: []*depotv1.Architecture{{Name: "arm64", Emulated: true}, {Name: "amd64"}},
	}
	ca := newAuthority(t)
	mux := http.NewServeMux()
	mux.Handle(depotv1connect.NewBuilderServiceHandler(p))
	s := httptest.NewUnstartedServer(mux)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{ca.serverLeaf(t, client.PinnedName)}, MinVersion: tls.VersionTLS13}
	s.EnableHTTP2 = true
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	s.StartTLS()
	t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
	w := &world{plane: p, host: s.Listener.Addr().String(), stderr: &transcript{}, screen: screen{&transcript{}}}
	w.env = map[string]string{
		"DEPOT_API_URL": s.URL,
		"DEPOT_TOKEN":   "depot_project_" + strings.Repeat("0a", 16) + "_" + strings.Repeat("q", 52) + mtls.PinOf(ca.cert),
	}
	dir := t.TempDir()
	w.factory = &Factory{sessions: map[sessionKey]*session{}, opts: Options{
		Credentials: credentials.Source{
			Env: func(k string) string { return w.env[k] }, Dir: dir,
			Store: credentials.Store{Dir: func() string { return dir }, NoKeyring: true},
		},
		UserAgent: "test", Stderr: w.stderr,
	}}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		w.factory.ReleaseAll(ctx)
		if ids := p.held(); len(ids) > 0 {
			t.Errorf("leases are left behind: %v", ids)
		}
	})
	return w
}

// node returns the driver of the amd64 node, as buildx makes it.
func (w *world) node(t *testing.T, opts map[string]string) *bx.DriverHandle {
	t.Helper()
	h, err := bx.GetDriver(t.Context(), w.factory, bx.InitConfig{
		Name: "n", EndpointAddr: "depot://" + w.host + "/acme/web/amd64", DriverOpts: opts,
	})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// transcript collects what was shown.
type transcript struct {
	mu   sync.Mutex
	text strings.Builder // guarded by mu
}

var (
	_ io.Writer       = (*transcript)(nil)
	_ progress.Writer = screen{}
)

// Write collects text.
func (s *transcript) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(b)
}

func (s *transcript) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// screen is a progress display that collects names and logs.
type screen struct{ *transcript }

func (s screen) Write(st *bkclient.SolveStatus) {
	for _, v := range st.Vertexes {
		if v.Completed == nil {
			_, _ = s.transcript.Write([]byte(v.Name + "\n"))
		}
	}
	for _, l := range st.Logs {
		_, _ = s.transcript.Write(l.Data)
	}
}
func (s screen) WriteBuildRef(string, string)              {}
func (s screen) ValidateLogSource(digest.Digest, any) bool { return true }
func (s screen) ClearLogSource(any)                        {}
