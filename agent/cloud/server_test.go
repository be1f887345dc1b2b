package cloud

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base32"
	"errors"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/api/depot/v1/depotv1connect"
	"github.com/opendepot/depot/controlplane/client"
)

// authority is a certificate authority in memory.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10 * 365 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return authority{cert, key}
}

// issue signs a leaf for public.
func (a authority) issue(public any, usage x509.ExtKeyUsage, lifetime time.Duration, names ...string) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, err
	}
	return x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, DNSNames: names, NotBefore: time.Now().Add(-5 * time.Minute), NotAfter: time.Now().Add(lifetime),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}, a.cert, public, a.key)
}

func (a authority) pin() string {
	sum := sha256.Sum256(a.cert.RawSubjectPublicKeyInfo)
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:]))
}

// listener accepts connections from within the process.
type listener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *listener) Addr() net.Addr { return &net.UnixAddr{Name: "memory", Net: "unix"} }

// server is a control plane's AgentService, over real TLS with real client
// certificates; only its network is memory, so that time can be the test's.
type server struct {
	t         *testing.T
	authority authority
	token     string
	lifetime  time.Duration // of the agents' certificates

	mu       sync.Mutex // guards all below
	up       *http.Server
	listener *listener
	id       string
	epoch    uint64
	orders   *depotv1.SyncAgentResponse
	changed  chan struct{} // closed when orders change
	joined   []byte        // the public key that the token is bound to
	joins    int
	renewals int
	syncs    int
	report   *depotv1.SyncAgentRequest
	leaf     *x509.Certificate // of the last call
	fail     error             // of each SyncAgent
	failJoin error             // of the next Join, after it took effect
}

const (
	serverID = "srv_0192aaaaaaaa70008000000000000001"
	agentID  = "agt_0192aaaaaaaa70008000000000000001"
)

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{
		t: t, authority: newAuthority(t), lifetime: 24 * time.Hour, id: serverID, epoch: 1,
		orders: &depotv1.SyncAgentResponse{Revision: 1}, changed: make(chan struct{}),
	}
	s.token = "depot_agent_" + strings.Repeat("0", 32) + "_" + strings.Repeat("a", 52) + s.authority.pin()
	s.start()
	t.Cleanup(s.stop)
	return s
}

// start lets the server be reached.
func (s *server) start() {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(s.t, err)
	leaf, err := s.authority.issue(key.Public(), x509.ExtKeyUsageServerAuth, 10*365*24*time.Hour, "depot-controlplane", "controlplane")
	must(s.t, err)
	pool := x509.NewCertPool()
	pool.AddCert(s.authority.cert)
	mux := http.NewServeMux()
	mux.Handle(depotv1connect.NewAgentServiceHandler(s))
	up := &http.Server{
		ReadHeaderTimeout: time.Minute,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mux.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), leafKey{}, r.TLS.PeerCertificates)))
		}),
		TLSConfig: &tls.Config{
			MinVersion:   tls.VersionTLS13,
			Certificates: []tls.Certificate{{Certificate: [][]byte{leaf, s.authority.cert.Raw}, PrivateKey: key}},
			ClientAuth:   tls.VerifyClientCertIfGiven, ClientCAs: pool,
		},
	}
	l := &listener{conns: make(chan net.Conn), done: make(chan struct{})}
	s.mu.Lock()
	s.up, s.listener = up, l
	s.mu.Unlock()
	go up.ServeTLS(l, "", "") //nolint:errcheck // it ends with stop
}

// stop kills it.
func (s *server) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.up != nil {
		s.up.Close() //nolint:errcheck,gosec // it is gone either way
		s.up = nil
	}
}

// dial connects as over a network.
func (s *server) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	s.mu.Lock()
	l := s.listener
	s.mu.Unlock()
	here, there := net.Pipe()
	select {
	case l.conns <- there:
		return here, nil
	case <-l.done:
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("connection refused")}
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

type leafKey struct{}

// caller returns the leaf of the calling agent.
func (s *server) caller(ctx context.Context) (*x509.Certificate, error) {
	chain, _ := ctx.Value(leafKey{}).([]*x509.Certificate)
	if len(chain) == 0 {
		return nil, connect.NewError(connect.CodeUnauthenticated, errors.New("no certificate"))
	}
	return chain[0], nil
}

// Join implements the service.
func (s *server) Join(_ context.Context, req *depotv1.JoinRequest) (*depotv1.JoinResponse, error) {
	csr, err := x509.ParseCertificateRequest(req.GetCsr())
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.joins++
	switch {
	case req.GetToken() != s.token:
		return nil, connect.NewError(connect.CodeUnauthenticated, errors.New("the token is not known"))
	case s.joined != nil && string(s.joined) != string(csr.RawSubjectPublicKeyInfo):
		return nil, connect.NewError(connect.CodePermissionDenied, errors.New("the token was used with another key"))
	}
	s.joined = csr.RawSubjectPublicKeyInfo
	if err := s.failJoin; err != nil {
		s.failJoin = nil
		return nil, err
	}
	cert, err := s.certificate(csr)
	return &depotv1.JoinResponse{AgentId: agentID, ServerId: s.id, Identity: cert}, err
}

func (s *server) certificate(csr *x509.CertificateRequest) (*depotv1.Certificate, error) {
	der, err := s.authority.issue(csr.PublicKey, x509.ExtKeyUsageClientAuth, s.lifetime)
	return &depotv1.Certificate{Chain: [][]byte{der}}, err
}

// RenewIdentity implements the service.
func (s *server) RenewIdentity(ctx context.Context, req *depotv1.RenewIdentityRequest) (*depotv1.RenewIdentityResponse, error) {
	if _, err := s.caller(ctx); err != nil {
		return nil, err
	}
	csr, err := x509.ParseCertificateRequest(req.GetCsr())
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.renewals++
	cert, err := s.certificate(csr)
	return &depotv1.RenewIdentityResponse{Identity: cert}, err
}

// SyncAgent implements the service.
func (s *server) SyncAgent(ctx context.Context, req *depotv1.SyncAgentRequest) (*depotv1.SyncAgentResponse, error) {
	leaf, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	late := time.NewTimer(25 * time.Second)
	defer late.Stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.syncs++
	s.report, s.leaf = req, leaf
	if s.fail != nil {
		return nil, s.fail
	}
	for s.orders.GetRevision() == req.GetHaveRevision() {
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
			s.mu.Lock()
		case <-late.C:
			s.mu.Lock()
			return s.answer(), nil
		case <-ctx.Done():
			s.mu.Lock()
			return nil, ctx.Err()
		}
	}
	return s.answer(), nil
}

func (s *server) answer() *depotv1.SyncAgentResponse {
	resp, ok := proto.Clone(s.orders).(*depotv1.SyncAgentResponse)
	if !ok {
		panic("a clone is of the same type")
	}
	resp.ServerId, resp.Epoch = s.id, s.epoch
	return resp
}

// order makes these the orders: all of them.
func (s *server) order(machines ...*depotv1.MachineOrder) {
	s.orderAll(&depotv1.SyncAgentResponse{Machines: machines})
}

func (s *server) orderAll(orders *depotv1.SyncAgentResponse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	orders.Revision = s.orders.GetRevision() + 1
	s.orders = orders
	close(s.changed)
	s.changed = make(chan struct{})
}

// set changes how the server behaves.
func (s *server) set(change func(*server)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

// get reads something of the server.
func get[T any](s *server, read func(*server) T) T {
	s.mu.Lock()
	defer s.mu.Unlock()
	return read(s)
}

// machine returns what was last reported of a machine, or nil.
func (s *server) machine(id string) *depotv1.ObservedMachine {
	for _, m := range get(s, func(s *server) *depotv1.SyncAgentRequest { return s.report }).GetMachines() {
		if m.GetId() == id {
			return m
		}
	}
	return nil
}

func (s *server) parsedToken() client.Token {
	token, err := client.ParseToken(s.token)
	must(s.t, err)
	return token
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
