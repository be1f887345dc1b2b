package server_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/auth"
	"github.com/opendepot/depot/controlplane/ca"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/controlplane/scheduler"
	"github.com/opendepot/depot/controlplane/server"
	"github.com/opendepot/depot/controlplane/store"
	"github.com/opendepot/depot/internal/mtls"
)

// patience bounds what a test waits for; nothing comes near it unless it is
// broken.
const patience = 2 * time.Minute

// times are the protocol's, but calls without news end soon, and agents may be
// silent while a test lets leases pass their deadlines.
func times() controlplane.Times {
	t := controlplane.DefaultTimes()
	t.AgentSilent = 30 * time.Second
	t.Hang = 500 * time.Millisecond
	return t
}

// controlPlane is a whole control plane in this process, as serve wires it:
// every part is the real one, but for the clock, which [controlPlane.pass]
// moves. It can be stopped and started again on the same data directory.
type controlPlane struct {
	dir       string
	masterKey []byte
	times     controlplane.Times
	log       *logs
	operator  string // the administrator's token

	base time.Time

	mu     sync.Mutex // guards passed, runs and the addresses
	passed time.Duration
	// runs lets the clock run by itself as well.
	runs bool
	// clientAddr and agentAddr change with each start; clients dial the current.
	clientAddr, agentAddr string

	// These are of the current start.
	store     *store.Store
	authority *ca.Authority
	auth      *auth.Authenticator
	record    controlplane.Server
	scheduler *scheduler.Scheduler
	server    *server.Server
	pin       string
	stop      func(tb testing.TB)
}

// newControlPlane starts a control plane that ends with the test. change, if
// set, alters its times.
func newControlPlane(tb testing.TB, change ...func(*controlplane.Times)) *controlPlane {
	tb.Helper()
	cp := &controlPlane{dir: tb.TempDir(), masterKey: make([]byte, 32), times: times(), log: new(logs), base: time.Now()}
	_, _ = rand.Read(cp.masterKey)
	for _, c := range change {
		c(&cp.times)
	}
	cp.start(tb)
	tb.Cleanup(func() {
		cp.stop(tb)
		if tb.Failed() {
			tb.Log(cp.log.String())
		}
	})
	token, text, err := cp.auth.NewToken(controlplane.Token{Kind: controlplane.TokenUser, Name: "operator", Role: controlplane.RoleAdmin}, cp.now())
	must(tb, err)
	cp.update(tb, func(tx controlplane.Tx) error { return tx.PutToken(tb.Context(), token) })
	cp.operator = text
	return cp
}

// now stands still but for a microsecond at each look, so that no deadline
// depends on how fast the test runs.
func (cp *controlPlane) now() time.Time {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	cp.passed += time.Microsecond
	if cp.runs {
		return time.Now().Add(cp.passed).UTC()
	}
	return cp.base.Add(cp.passed).UTC()
}

// run lets the clock run.
func (cp *controlPlane) run() {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	cp.runs = true
}

// pass moves the clock, and has every scope planned before and after.
func (cp *controlPlane) pass(tb testing.TB, d time.Duration) {
	tb.Helper()
	cp.plan(tb)
	cp.mu.Lock()
	cp.passed += d
	cp.mu.Unlock()
	cp.plan(tb)
}

// plan plans every scope now, beside the scheduler's own loop.
func (cp *controlPlane) plan(tb testing.TB) {
	tb.Helper()
	var scopes []controlplane.Scope
	cp.view(tb, func(tx controlplane.Tx) (err error) {
		scopes, err = tx.LiveScopes(tb.Context())
		return err
	})
	for _, sc := range scopes {
		_, err := cp.scheduler.PlanScope(tb.Context(), sc)
		must(tb, err)
	}
}

// start opens the data directory and serves.
func (cp *controlPlane) start(tb testing.TB) {
	tb.Helper()
	ctx := tb.Context()
	log := slog.New(slog.NewTextHandler(cp.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	var err error
	cp.authority, err = ca.New(cp.masterKey)
	must(tb, err)
	cp.store, err = store.Open(ctx, store.Config{Path: filepath.Join(cp.dir, "depot.db"), Logger: log})
	must(tb, err)
	cp.begin(tb)
	joinKey, err := cp.authority.Open(cp.record.ID, cp.record.JoinKey)
	must(tb, err)
	own, err := x509.ParseCertificate(cp.record.TLS.Certificate)
	must(tb, err)
	cp.pin = mtls.PinOf(own)
	cp.auth, err = auth.New(auth.Config{Store: cp.store, Pin: cp.pin, Random: rand.Reader, Logger: log})
	must(tb, err)
	cp.server = server.New(server.Config{
		Store: cp.store, Authority: cp.authority, Authenticator: cp.auth, Times: cp.times, Sizes: controlplane.DefaultSizes(),
		Now: cp.now, Record: cp.record, JoinKey: joinKey, Version: "test", Log: log,
	})
	cp.scheduler = &scheduler.Scheduler{
		Store: cp.store, Times: cp.times, Sizes: controlplane.DefaultSizes(), Started: cp.now(), Now: cp.now, Log: log, Planned: cp.server.Planned,
	}
	identity := cp.ownIdentity(tb)
	anchors, err := mtls.NewAnchors([][]byte{cp.record.Agents.Certificate})
	must(tb, err)
	protocols := []string{"h2", "http/1.1"}
	clients := listen(tb, mtls.Server{Identity: identity, NextProtos: protocols}.Config())
	agents := listen(tb, mtls.Server{Identity: identity, Anchors: anchors, Optional: true, NextProtos: protocols, Time: cp.now}.Config())
	cp.mu.Lock()
	cp.clientAddr, cp.agentAddr = clients.Addr().String(), agents.Addr().String()
	cp.mu.Unlock()

	ctx, cancel := context.WithCancel(ctx)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return cp.scheduler.Run(ctx) })
	g.Go(func() error { return cp.server.Run(ctx) })
	g.Go(func() error { return serveHTTP(ctx, clients, cp.server.Clients(), log) })
	g.Go(func() error { return serveHTTP(ctx, agents, cp.server.Agents(), log) })
	st := cp.store
	cp.stop = func(tb testing.TB) {
		tb.Helper()
		cancel()
		must(tb, g.Wait())
		must(tb, st.Close())
	}
}

// restart ends the control plane and starts another on its data directory.
func (cp *controlPlane) restart(tb testing.TB) {
	tb.Helper()
	cp.stop(tb)
	cp.start(tb)
}

// begin raises the epoch of the record, which the first start makes.
func (cp *controlPlane) begin(tb testing.TB) {
	tb.Helper()
	ctx := tb.Context()
	fresh := controlplane.Server{ID: controlplane.NewID(controlplane.KindServer, cp.now(), rand.Reader), Created: cp.now()}
	var err error
	fresh.Agents, err = cp.authority.NewAuthority(fresh.ID, "agents")
	must(tb, err)
	fresh.TLS, err = cp.authority.NewAuthority(fresh.ID, "control plane")
	must(tb, err)
	key := make([]byte, 32)
	_, _ = rand.Read(key)
	fresh.JoinKey, err = cp.authority.Seal(fresh.ID, key)
	must(tb, err)
	cp.update(tb, func(tx controlplane.Tx) (err error) {
		if cp.record, err = tx.Server(ctx); controlplane.CodeOf(err) == controlplane.NotFound {
			cp.record = fresh
			err = tx.PutOrganization(ctx, controlplane.Organization{ID: controlplane.NewID(controlplane.KindOrganization, cp.now(), rand.Reader), Name: "acme", Created: cp.now()})
		}
		if err != nil {
			return err
		}
		cp.record.Epoch++
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
		return tx.PutServer(ctx, cp.record)
	})
}

// ownIdentity is what both listeners show.
func (cp *controlPlane) ownIdentity(tb testing.TB) *mtls.Identity {
	tb.Helper()
	key, csr := newKey(tb)
	issued, err := cp.authority.Sign(tb.Context(), cp.record.TLS, cp.record.ID, controlplane.Leaf{
		CSR: csr, Usage: controlplane.UsageServer, DNSNames: []string{client.PinnedName},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	})
	must(tb, err)
	identity, err := mtls.NewIdentity(key, issued.Chain)
	must(tb, err)
	return identity
}

// client returns a client of the listener for clients, with a token's text.
func (cp *controlPlane) client(tb testing.TB, token string) *client.Client {
	tb.Helper()
	cfg := client.Config{URL: "https://clients.test", Pin: cp.pin, Dial: cp.dial(func() string { return cp.clientAddr })}
	if token != "" {
		var err error
		cfg.Token, err = client.ParseToken(token)
		must(tb, err)
	}
	return newClient(tb, cfg)
}

// agentClient returns a client of the listener for agents and machines.
func (cp *controlPlane) agentClient(tb testing.TB, identity *mtls.Identity) *client.Client {
	tb.Helper()
	return newClient(tb, client.Config{
		URL: "https://agents.test", Pin: cp.pin, Identity: identity, Dial: cp.dial(func() string { return cp.agentAddr }),
	})
}

// agentsWithToken is for a client that tries a token on the agents' listener.
func (cp *controlPlane) agentsWithToken(tb testing.TB, text string) client.Config {
	tb.Helper()
	token, err := client.ParseToken(text)
	must(tb, err)
	return client.Config{URL: "https://agents.test", Token: token, Tries: 1, Dial: cp.dial(func() string { return cp.agentAddr })}
}

func newClient(tb testing.TB, cfg client.Config) *client.Client {
	tb.Helper()
	c, err := client.New(cfg)
	must(tb, err)
	tb.Cleanup(c.Close)
	return c
}

// dial connects to where the control plane listens now, whatever the URL says.
func (cp *controlPlane) dial(addr func() string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		cp.mu.Lock()
		to := addr()
		cp.mu.Unlock()
		return new(net.Dialer).DialContext(ctx, network, to)
	}
}

func (cp *controlPlane) admin(tb testing.TB) *client.Client {
	tb.Helper()
	return cp.client(tb, cp.operator)
}

// project makes a project, and returns its id and a token that builds in it.
func (cp *controlPlane) project(tb testing.TB, name string, settings *depotv1.ProjectSettings) (id, token string) {
	tb.Helper()
	c := cp.admin(tb)
	made, err := c.Admin.CreateProject(tb.Context(), &depotv1.CreateProjectRequest{Name: name, Settings: settings})
	must(tb, err)
	id = made.GetProject().GetId()
	return id, cp.token(tb, &depotv1.CreateTokenRequest{Kind: "project", Name: name + "-ci", Project: &depotv1.ProjectRef{Id: id}})
}

// token makes a token and returns its text.
func (cp *controlPlane) token(tb testing.TB, req *depotv1.CreateTokenRequest) string {
	tb.Helper()
	made, err := cp.admin(tb).Admin.CreateToken(tb.Context(), req)
	must(tb, err)
	return made.GetSecret()
}

// readyz asks the listener for operators.
func (cp *controlPlane) readyz(tb testing.TB) (status int, body string) {
	tb.Helper()
	w := httptest.NewRecorder()
	cp.server.Ops().ServeHTTP(w, httptest.NewRequestWithContext(tb.Context(), http.MethodGet, "/readyz", nil))
	return w.Code, w.Body.String()
}

func (cp *controlPlane) update(tb testing.TB, fn func(tx controlplane.Tx) error) {
	tb.Helper()
	must(tb, cp.store.Update(tb.Context(), fn))
}

func (cp *controlPlane) view(tb testing.TB, fn func(tx controlplane.Tx) error) {
	tb.Helper()
	must(tb, cp.store.View(tb.Context(), fn))
}

// machineNow, leaseNow and generationNow are what the store holds.
func (cp *controlPlane) machineNow(tb testing.TB, id string) (m controlplane.Machine) {
	tb.Helper()
	cp.view(tb, func(tx controlplane.Tx) (err error) {
		m, err = tx.Machine(tb.Context(), id)
		return err
	})
	return m
}

func (cp *controlPlane) leaseNow(tb testing.TB, id string) (l controlplane.Lease) {
	tb.Helper()
	cp.view(tb, func(tx controlplane.Tx) (err error) {
		l, err = tx.Lease(tb.Context(), id)
		return err
	})
	return l
}

func (cp *controlPlane) generationNow(tb testing.TB, id string) (g controlplane.Generation) {
	tb.Helper()
	cp.view(tb, func(tx controlplane.Tx) (err error) {
		g, err = tx.Generation(tb.Context(), id)
		return err
	})
	return g
}

// eventually asks until it is so.
func (cp *controlPlane) eventually(tb testing.TB, what string, so func() bool) {
	tb.Helper()
	end := time.After(patience)
	for !so() {
		select {
		case <-end:
			tb.Fatalf("waited in vain: %s", what)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func listen(tb testing.TB, config *tls.Config) net.Listener {
	tb.Helper()
	l, err := new(net.ListenConfig).Listen(tb.Context(), "tcp", "127.0.0.1:0")
	must(tb, err)
	return tls.NewListener(l, config)
}

func serveHTTP(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	hs := &http.Server{
		Handler: h, Protocols: protocols, ReadHeaderTimeout: patience, MaxHeaderBytes: 64 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx }, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- hs.Serve(l) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	err := hs.Close()
	<-done
	return err
}

// newKey makes a key, and the request for its certificate.
func newKey(tb testing.TB) (key *mtls.Key, csr []byte) {
	tb.Helper()
	key, err := mtls.NewKey()
	must(tb, err)
	csr, err = key.CSR()
	must(tb, err)
	return key, csr
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// refused checks that err has code and that its message has all of words.
func refused(tb testing.TB, err error, code connect.Code, words ...string) {
	tb.Helper()
	if err == nil {
		tb.Fatalf("not refused, want %s", code)
	}
	if got := connect.CodeOf(err); got != code {
		tb.Fatalf("refused with %s (%v), want %s", got, err, code)
	}
	has(tb, message(err), words...)
}

// message is what the server said.
func message(err error) string {
	if rpc, ok := errors.AsType[*connect.Error](err); ok {
		return rpc.Message()
	}
	return err.Error()
}

func has(tb testing.TB, text string, words ...string) {
	tb.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			tb.Fatalf("%q does not say %q", text, w)
		}
	}
}

// logs is a log that can be read while it is written.
type logs struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (l *logs) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}
