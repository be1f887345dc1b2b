package machine

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/internal/mtls"
)

// stand is a front before a unix socket that handle serves.
type stand struct {
	*leases
	project *authority
	anchors *mtls.Anchors
	server  *mtls.Identity
	address string
	log     *log
}

// log collects what was logged.
type log struct {
	changed bell

	mu   sync.Mutex
	text strings.Builder
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.changed.ring()
	return l.text.Write(p)
}

func (l *log) await(tb testing.TB, text string) {
	tb.Helper()
	timeout := time.After(10 * time.Second)
	for {
		changed := l.changed.next()
		if strings.Contains(l.String(), text) {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			tb.Fatalf("the log does not say %q within 10 s: %s", text, l)
		}
	}
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func newStand(tb testing.TB, handle func(*net.UnixConn)) *stand {
	tb.Helper()
	socket := filepath.Join(tb.TempDir(), "daemon.sock")
	daemon, err := net.Listen("unix", socket) //nolint:noctx // at once
	if err != nil {
		tb.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // at once
	if err != nil {
		tb.Fatal(err)
	}
	project := newAuthority(tb)
	s := &stand{
		leases:  newLeases(testID("mch", "1"), "", func() {}),
		project: project,
		anchors: project.anchors(tb),
		server:  project.identity(tb, forServer(machineName)),
		address: listener.Addr().String(),
		log:     &log{},
	}
	s.allow(testID("srv", "1"))
	f := newFront(listener, s.server, s.anchors, s.leases, socket, slog.New(slog.NewTextHandler(s.log, nil)))
	ctx, cancel := context.WithCancel(context.Background())
	var tasks sync.WaitGroup
	tasks.Go(func() {
		if err := f.run(ctx); err != nil {
			tb.Error(err)
		}
	})
	tasks.Go(func() {
		for {
			conn, err := daemon.Accept()
			if err != nil {
				return
			}
			tasks.Go(func() { handle(conn.(*net.UnixConn)) }) //nolint:errcheck,forcetypeassert // a unix listener's
		}
	})
	tb.Cleanup(func() {
		cancel()
		_ = daemon.Close()
		tasks.Wait()
	})
	return s
}

// echo sends back what it gets, and its end.
func echo(c *net.UnixConn) {
	defer c.Close() //nolint:errcheck // a test's connection
	_, _ = io.Copy(c, c)
}

func (s *stand) name(lease string) mtls.LeafName {
	return mtls.LeafName{Server: testID("srv", "1"), Lease: lease, Machine: testID("mch", "1")}
}

func (s *stand) client(tb testing.TB, identity *mtls.Identity) *tls.Config {
	tb.Helper()
	return mtls.Client{Identity: identity, Anchors: s.project.anchors(tb), ServerName: machineName, NextProtos: []string{"h2"}}.Config()
}

// dial connects and proves that bytes pass: in TLS 1.3 a client learns of a
// refusal only when it reads.
func (s *stand) dial(tb testing.TB, config *tls.Config) (*tls.Conn, error) {
	tb.Helper()
	conn, err := (&tls.Dialer{Config: config}).DialContext(tb.Context(), "tcp", s.address)
	if err != nil {
		return nil, err
	}
	_, err = conn.Write([]byte("x"))
	if err == nil {
		_, err = io.ReadFull(conn, make([]byte, 1))
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn.(*tls.Conn), nil //nolint:errcheck,forcetypeassert // as documented
}

// TestAdmission is own-lease, at the machine.
func TestAdmission(t *testing.T) {
	s := newStand(t, echo)
	lease, ended := testID("lse", "1"), testID("lse", "2")
	s.setEnded([]string{ended})
	foreign := newAuthority(t)
	own := named(s.name(lease))
	for name, test := range map[string]struct {
		identity *mtls.Identity
		change   func(*tls.Config)
		wantLog  string // of the refusal; empty means admitted
	}{
		"own lease":       {identity: s.project.identity(t, forClient, own)},
		"no certificate":  {wantLog: "didn't provide a certificate"},
		"foreign machine": {identity: s.project.identity(t, forClient, named(mtls.LeafName{Server: testID("srv", "1"), Lease: lease, Machine: testID("mch", "2")})), wantLog: "opens the machine " + testID("mch", "2")},
		"foreign server":  {identity: s.project.identity(t, forClient, named(mtls.LeafName{Server: testID("srv", "2"), Lease: lease, Machine: testID("mch", "1")})), wantLog: "belongs to " + testID("srv", "1")},
		"ended lease":     {identity: s.project.identity(t, forClient, named(s.name(ended))), wantLog: "lease has ended"},
		"no name":         {identity: s.project.identity(t, forClient), wantLog: "does not name one lease"},
		"foreign project": {identity: foreign.identity(t, forClient, own), wantLog: "unknown authority"},
		"expired":         {identity: s.project.identity(t, forClient, own, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), wantLog: "expired"},
		"server's as client's": {
			identity: s.project.identity(t, forServer(machineName), own), wantLog: "incompatible key usage",
		},
		"TLS 1.2": {
			identity: s.project.identity(t, forClient, own), wantLog: "unsupported versions",
			change: func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 },
		},
	} {
		t.Run(name, func(t *testing.T) {
			config := s.client(t, test.identity)
			if test.change != nil {
				test.change(config)
			}
			conn, err := s.dial(t, config)
			if test.wantLog == "" {
				if err != nil {
					t.Fatal(err)
				}
				_ = conn.Close()
				return
			}
			if err == nil {
				_ = conn.Close()
				t.Fatal("admitted")
			}
			if !strings.Contains(err.Error(), "remote error: tls:") {
				t.Errorf("the client saw %v, want an alert", err)
			}
			// The alert is sent before the refusal is logged.
			s.log.await(t, test.wantLog)
		})
	}
	t.Run("client's as server's", func(t *testing.T) {
		if err := s.server.Set(certificate(t, s.project, forClient, own)); err != nil {
			t.Fatal(err)
		}
		if _, err := s.dial(t, s.client(t, s.project.identity(t, forClient, own))); err == nil || !strings.Contains(err.Error(), "not for this role") {
			t.Errorf("the client saw %v", err)
		}
	})
}

func certificate(tb testing.TB, a *authority, change ...func(*x509.Certificate)) tls.Certificate {
	tb.Helper()
	key := newAuthority(tb).key
	leaf, err := a.sign(key.Public(), change...)
	if err != nil {
		tb.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{leaf}, PrivateKey: key}
}

func TestRefusedWhileClosed(t *testing.T) {
	s := newStand(t, echo)
	s.deny("it is draining")
	config := s.client(t, s.project.identity(t, forClient, named(s.name(testID("lse", "1")))))
	if _, err := s.dial(t, config); err == nil {
		t.Error("admitted")
	}
	s.allow(testID("srv", "1"))
	conn, err := s.dial(t, config)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
}

func TestEndedLeaseIsCut(t *testing.T) {
	s := newStand(t, echo)
	lease, other := testID("lse", "1"), testID("lse", "2")
	first, err := s.dial(t, s.client(t, s.project.identity(t, forClient, named(s.name(lease)))))
	if err != nil {
		t.Fatal(err)
	}
	second, err := s.dial(t, s.client(t, s.project.identity(t, forClient, named(s.name(other)))))
	if err != nil {
		t.Fatal(err)
	}
	s.setEnded([]string{lease})
	if _, err := first.Read(make([]byte, 1)); err == nil {
		t.Error("the ended lease's connection still gives bytes")
	}
	if _, err := second.Write([]byte("y")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(second, make([]byte, 1)); err != nil {
		t.Errorf("the other lease's connection: %v", err)
	}
	_ = first.Close()
	_ = second.Close()
}

func TestExpiryCutsNothing(t *testing.T) {
	s := newStand(t, echo)
	end := time.Now().Add(2 * time.Second).Truncate(time.Second).Add(time.Second)
	config := s.client(t, s.project.identity(t, forClient, named(s.name(testID("lse", "1"))), func(c *x509.Certificate) { c.NotAfter = end }))
	conn, err := s.dial(t, config)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() //nolint:errcheck // a test's connection
	<-time.After(time.Until(end) + time.Second)
	if late, err := s.dial(t, config); err == nil {
		_ = late.Close()
		t.Error("an expired certificate was admitted")
	}
	if _, err := conn.Write([]byte("y")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Errorf("after its certificate's end, the connection: %v", err)
	}
}

// TestHalfClose: a client that has sent all still gets its answer, and the
// other way round.
func TestHalfClose(t *testing.T) {
	const size = 1 << 20
	for name, test := range map[string]struct {
		daemon func(*net.UnixConn)
		client func(*tls.Conn) error
	}{
		"client first": {
			daemon: func(c *net.UnixConn) {
				got, err := io.ReadAll(c)
				if err == nil {
					_, _ = c.Write(got)
				}
				_ = c.Close()
			},
			client: func(c *tls.Conn) error {
				sent := make(chan error, 1)
				go func() {
					_, err := c.Write(make([]byte, size))
					sent <- errors.Join(err, c.CloseWrite())
				}()
				got, err := io.ReadAll(c)
				if len(got) != size {
					err = errors.Join(err, errors.New("bytes were lost"))
				}
				return errors.Join(err, <-sent)
			},
		},
		"daemon first": {
			daemon: func(c *net.UnixConn) {
				_, _ = c.Write([]byte("done"))
				_ = c.CloseWrite()
				if got, _ := io.ReadAll(c); len(got) == size {
					_ = c.Close()
				}
			},
			client: func(c *tls.Conn) error {
				got, err := io.ReadAll(c)
				if string(got) != "done" {
					err = errors.Join(err, errors.New("bytes were lost"))
				}
				_, werr := c.Write(make([]byte, size))
				return errors.Join(err, werr, c.CloseWrite())
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStand(t, test.daemon)
			conn, err := (&tls.Dialer{Config: s.client(t, s.project.identity(t, forClient, named(s.name(testID("lse", "1")))))}).DialContext(t.Context(), "tcp", s.address)
			if err != nil {
				t.Fatal(err)
			}
			if err := test.client(conn.(*tls.Conn)); err != nil { //nolint:errcheck,forcetypeassert // as documented
				t.Error(err)
			}
			_ = conn.Close()
		})
	}
}

// pipes is a listener of connections in memory.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

func (p *pipes) dial(ctx context.Context) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case p.conns <- far:
		return near, nil
	case <-p.done:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// TestHandshakeTimeout: silent clients are ended, and while they hold all
// places, others wait and then get in.
func TestHandshakeTimeout(t *testing.T) {
	project := newAuthority(t)
	server, anchors := project.identity(t, forServer(machineName)), project.anchors(t)
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		l := newLeases(testID("mch", "1"), "", func() {})
		l.allow(testID("srv", "1"))
		f := newFront(p, server, anchors, l, "/nonexistent", slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- f.run(ctx) }()
		began := time.Now()
		var silent []net.Conn
		for range maxHandshakes + 1 {
			c, err := p.dial(ctx)
			if err != nil {
				t.Fatal(err)
			}
			silent = append(silent, c)
		}
		if _, err := silent[maxHandshakes].Read(make([]byte, 1)); err == nil {
			t.Error("a silent client got bytes")
		}
		if took := time.Since(began); took != 2*handshakeTimeout {
			t.Errorf("the one that waited was ended after %s, want %s", took, 2*handshakeTimeout)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestLeaseCounts(t *testing.T) {
	changes := 0
	l := newLeases(testID("mch", "1"), "", func() { changes++ })
	l.allow(testID("srv", "1"))
	name := func(digit string) mtls.LeafName {
		return mtls.LeafName{Server: testID("srv", "1"), Lease: testID("lse", digit), Machine: testID("mch", "1")}
	}
	cut := map[string]int{}
	enter := func(digit string) func() {
		t.Helper()
		leave, err := l.enter(name(digit), func(error) { cut[digit]++ })
		if err != nil {
			t.Fatal(err)
		}
		return leave
	}
	want := func(what string, want ...*depotv1.LeaseConnections) {
		t.Helper()
		if diff := cmp.Diff(open(&depotv1.SyncMachineRequest{Connections: want}), open(&depotv1.SyncMachineRequest{Connections: l.report()})); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
	}
	count := func(digit string, open int32, total int64) *depotv1.LeaseConnections {
		return &depotv1.LeaseConnections{LeaseId: testID("lse", digit), Open: open, Total: total}
	}
	want("at first")
	a1, a2, b := enter("a"), enter("a"), enter("b")
	want("three", count("a", 2, 2), count("b", 1, 1))
	a1()
	want("one left", count("a", 1, 2), count("b", 1, 1))
	l.setEnded([]string{testID("lse", "a"), testID("lse", "c")})
	if diff := cmp.Diff(map[string]int{"a": 1}, cut); diff != "" {
		t.Error(diff)
	}
	if _, err := l.enter(name("c"), nil); !errors.Is(err, errLeaseEnded) {
		t.Errorf("an ended lease entered: %v", err)
	}
	a2()
	want("the ended one is forgotten", count("b", 1, 1))
	l.deny("test")
	if _, err := l.enter(name("d"), nil); !errors.Is(err, errClosed) {
		t.Errorf("entered a closed machine: %v", err)
	}
	l.cutAll(errClosed)
	b()
	want("none open", count("b", 0, 1))
	if cut["b"] != 1 || l.connections() != 0 || changes != 6 {
		t.Errorf("cut %v, %d open, %d changes", cut, l.connections(), changes)
	}
}
