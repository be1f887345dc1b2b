package machine

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/internal/mtls"
)

// standing is a session, registered, whose control plane is reached in memory
// so that time can be the test's.
type standing struct {
	*controlPlane
	t        *testing.T // the bubble's
	session  *session
	reporter *reporter
	pipes    *pipes
}

// inBubble runs test in a bubble of time, with a session that is registered.
func inBubble(t *testing.T, test func(*standing)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		c := makeControlPlane(t, dir)
		p := newPipes()
		c.serve(t, p)
		defer c.stop()
		if err := os.WriteFile(filepath.Join(dir, "join-token"), []byte("join"), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := newSession(Config{
			MachineID: testID("mch", "1"), ServerID: c.id, Arch: "amd64",
			ControlPlane: ControlPlane{URL: "https://controlplane.test", Pin: mtls.PinOf(c.server.cert)},
			Paths:        Paths{Run: dir, Root: dir},
		}.withDefaults(), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		s.dial = p.dial
		if _, err := s.register(t.Context()); err != nil {
			t.Fatal(err)
		}
		changed := &bell{}
		r := &reporter{
			session: s, status: newStatus(changed), leases: newLeases(s.config.MachineID, c.id, changed.ring),
			changed: changed, log: slog.New(slog.DiscardHandler),
		}
		r.leases.allow(c.id)
		test(&standing{t: t, controlPlane: c, session: s, reporter: r, pipes: p})
		s.calls().Close()
	})
}

// run runs fn beside the test until the returned function is called.
func run(t *testing.T, fn func(context.Context)) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		fn(ctx)
	}()
	return func() {
		cancel()
		<-done
	}
}

func (s *standing) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.reports)
}

func (s *standing) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.syncErr = err
	s.ring()
}

func TestReportsFollowChanges(t *testing.T) {
	inBubble(t, func(s *standing) {
		t := s.t
		stop := run(t, s.reporter.run)
		defer stop()
		time.Sleep(10 * time.Minute) //nolint:forbidigo // the bubble's time
		synctest.Wait()
		idle := s.count()
		if idle < 20 || idle > 26 {
			t.Errorf("%d calls in ten idle minutes, want one each 25 s", idle)
		}
		leave, err := s.reporter.leases.enter(mtls.LeafName{Server: s.session.id(), Lease: testID("lse", "1"), Machine: testID("mch", "1")}, func(error) {})
		if err != nil {
			t.Fatal(err)
		}
		s.reporter.status.set(depotv1.MachineState_MACHINE_STATE_READY, "")
		time.Sleep(2 * coalesce) //nolint:forbidigo // the bubble's time
		synctest.Wait()
		if n := s.count(); n != idle+1 {
			t.Errorf("two changes at once made %d calls, want 1", n-idle)
		}
		last := s.reports[len(s.reports)-1]
		if last.GetState() != depotv1.MachineState_MACHINE_STATE_READY || len(last.GetConnections()) != 1 {
			t.Errorf("reported %v", last)
		}
		leave()
	})
}

func TestCutOff(t *testing.T) {
	inBubble(t, func(s *standing) {
		t := s.t
		stop := run(t, s.reporter.run)
		defer stop()
		synctest.Wait()
		leave, err := s.reporter.leases.enter(mtls.LeafName{Server: s.session.id(), Lease: testID("lse", "1"), Machine: testID("mch", "1")}, func(error) {})
		if err != nil {
			t.Fatal(err)
		}
		s.fail(connect.NewError(connect.CodeUnavailable, errors.New("down")))
		time.Sleep(3 * time.Hour) //nolint:forbidigo // the bubble's time
		if closed(s.reporter.status.draining) {
			t.Error("drained while a build runs")
		}
		s.fail(nil)
		time.Sleep(time.Minute) //nolint:forbidigo // the bubble's time
		leave()
		s.fail(connect.NewError(connect.CodeUnavailable, errors.New("down")))
		time.Sleep(50 * time.Minute) //nolint:forbidigo // the bubble's time
		if closed(s.reporter.status.draining) {
			t.Error("drained within the hour")
		}
		time.Sleep(11 * time.Minute) //nolint:forbidigo // the bubble's time
		if !closed(s.reporter.status.draining) || closed(s.reporter.status.hurry) {
			t.Error("cut off for an hour without a connection, and not drained in order")
		}
	})
}

func TestDirectives(t *testing.T) {
	for name, test := range map[string]struct {
		direct      func(*standing)
		wantDrain   bool
		wantNow     bool
		wantEnded   int
		wantStaying bool // the directive is not applied
	}{
		"nothing":      {direct: func(s *standing) { s.direct(&depotv1.SyncMachineResponse{}) }},
		"ended leases": {direct: func(s *standing) { s.direct(&depotv1.SyncMachineResponse{EndedLeases: []string{"a", "b"}}) }, wantEnded: 2},
		"drain":        {direct: func(s *standing) { s.direct(&depotv1.SyncMachineResponse{Drain: true}) }, wantDrain: true},
		"drain now":    {direct: func(s *standing) { s.direct(&depotv1.SyncMachineResponse{Drain: true, Now: true}) }, wantDrain: true, wantNow: true},
		"now only":     {direct: func(s *standing) { s.direct(&depotv1.SyncMachineResponse{Now: true}) }},
		"not found":    {direct: func(s *standing) { s.fail(connect.NewError(connect.CodeNotFound, errors.New("gone"))) }, wantDrain: true},
		"unavailable":  {direct: func(s *standing) { s.fail(connect.NewError(connect.CodeUnavailable, errors.New("down"))) }},
		"bad anchors":  {direct: func(s *standing) { s.direct(&depotv1.SyncMachineResponse{TrustAnchors: [][]byte{{1}}}) }},
		"foreign drain": {direct: func(s *standing) {
			s.mu.Lock()
			s.id = testID("srv", "2")
			s.mu.Unlock()
			s.direct(&depotv1.SyncMachineResponse{Drain: true, Now: true, EndedLeases: []string{"a"}})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(s *standing) {
				t := s.t
				stop := run(t, s.reporter.run)
				defer stop()
				synctest.Wait()
				test.direct(s)
				time.Sleep(time.Minute) //nolint:forbidigo // the bubble's time
				synctest.Wait()
				l := s.reporter.leases
				l.mu.Lock()
				defer l.mu.Unlock()
				if drain, now := closed(s.reporter.status.draining), closed(s.reporter.status.hurry); drain != test.wantDrain || now != test.wantNow || len(l.ended) != test.wantEnded {
					t.Errorf("drain %t, now %t, %d leases ended", drain, now, len(l.ended))
				}
				if n := s.count(); n > 100 {
					t.Errorf("%d calls in a minute", n)
				}
			})
		})
	}
}

func TestRenewal(t *testing.T) {
	inBubble(t, func(s *standing) {
		t := s.t
		// The first certificates were for an hour, renewed at half.
		stop := run(t, s.session.renew)
		defer stop()
		first := s.session.server.Leaf()
		time.Sleep(29 * time.Minute) //nolint:forbidigo // the bubble's time
		if s.session.server.Leaf() != first {
			t.Error("renewed before half of the lifetime")
		}
		time.Sleep(2 * time.Minute) //nolint:forbidigo // the bubble's time
		synctest.Wait()
		if s.session.server.Leaf() == first || !s.session.identity.Leaf().NotAfter.After(first.NotAfter) {
			t.Error("not renewed at half of the lifetime")
		}
		time.Sleep(5 * time.Hour) //nolint:forbidigo // the bubble's time
		synctest.Wait()
		if s.renewals < 10 || s.renewals > 12 {
			t.Errorf("%d renewals in five and a half hours, want one each half hour", s.renewals)
		}
		if _, err := s.session.calls().Machine.SyncMachine(t.Context(), &depotv1.SyncMachineRequest{MachineId: testID("mch", "1")}); err != nil {
			t.Errorf("with the renewed identity: %v", err)
		}
	})
}

func TestUntilRenewal(t *testing.T) {
	now := time.Now()
	for name, test := range map[string]struct {
		age, left, renewIn, want time.Duration
	}{
		"as the server says":       {left: 24 * time.Hour, renewIn: 10 * time.Hour, want: 10 * time.Hour},
		"the clock here is ahead":  {left: 24 * time.Hour, renewIn: -time.Hour, want: 24 * time.Hour / 20},
		"the clock here is behind": {left: 24 * time.Hour, renewIn: 40 * time.Hour, want: 12 * time.Hour},
		"backdated":                {age: 5 * time.Minute, left: 115 * time.Minute, renewIn: 55 * time.Minute, want: 55 * time.Minute},
		"the server says nothing":  {left: time.Hour, renewIn: -now.Sub(time.Unix(0, 0)), want: time.Hour / 20},
	} {
		t.Run(name, func(t *testing.T) {
			if got := untilRenewal(now.Add(-test.age), now.Add(test.left), now.Add(test.renewIn), now); got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
		})
	}
}

func TestRegister(t *testing.T) {
	for name, test := range map[string]struct {
		token   string
		change  func(*controlPlane, *Config)
		want    string // in the error; empty for success
		calls   int    // of Register that arrived, if not 0
		expired bool
	}{
		"good":          {token: "join"},
		"another token": {token: "stolen", want: "unauthenticated", calls: 1},
		"key is bound": {token: "join", change: func(c *controlPlane, _ *Config) {
			c.regErr = connect.NewError(connect.CodePermissionDenied, errors.New("the token is bound to another key"))
		}, want: "bound to another key", calls: 1},
		"server is down": {token: "join", change: func(c *controlPlane, _ *Config) {
			c.regErr = connect.NewError(connect.CodeUnavailable, errors.New("starting"))
		}, want: "not possible within"},
		"foreign server":  {token: "join", change: func(_ *controlPlane, c *Config) { c.ServerID = testID("srv", "9") }, want: "this machine belongs to"},
		"server unknown":  {token: "join", change: func(_ *controlPlane, c *Config) { c.ServerID = "" }},
		"another pin":     {token: "join", change: func(c *controlPlane, m *Config) { m.ControlPlane.Pin = mtls.PinOf(c.project.cert) }, want: "does not carry the pinned certificate"},
		"no token's file": {want: "read the join token"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				c := makeControlPlane(t, dir)
				p := newPipes()
				c.serve(t, p)
				defer c.stop()
				config := Config{
					MachineID: testID("mch", "1"), ServerID: c.id, Arch: "amd64",
					ControlPlane: ControlPlane{URL: "https://controlplane.test", Pin: mtls.PinOf(c.server.cert)},
					Paths:        Paths{Run: dir},
				}
				if test.change != nil {
					test.change(c, &config)
				}
				if test.token != "" {
					if err := os.WriteFile(filepath.Join(dir, "join-token"), []byte(test.token), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				s, err := newSession(config.withDefaults(), slog.New(slog.DiscardHandler))
				if err != nil {
					t.Fatal(err)
				}
				s.dial = p.dial
				defer func() { s.client.Close() }()
				m := &machine{config: s.config, session: s, status: newStatus(&bell{})}
				began := time.Now()
				_, err = m.register(t.Context())
				if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
					t.Errorf("got %v, want %q", err, test.want)
				}
				if took := time.Since(began); took > s.config.Times.Register {
					t.Errorf("took %s", took)
				}
				if test.calls != 0 && c.registers != test.calls {
					t.Errorf("%d calls, want %d", c.registers, test.calls)
				}
				if _, statErr := os.Stat(s.config.Paths.joinToken()); err == nil && !os.IsNotExist(statErr) {
					t.Error("the token is still there")
				}
			})
		})
	}
}

// TestRegisterWaitsForTheRelay: the relay may come up after the machine.
func TestRegisterWaitsForTheRelay(t *testing.T) {
	inBubble(t, func(s *standing) {
		t := s.t
		if err := os.WriteFile(s.session.config.Paths.joinToken(), []byte("join"), 0o600); err != nil {
			t.Fatal(err)
		}
		up := time.Now().Add(30 * time.Second)
		s.session.dial = func(ctx context.Context) (net.Conn, error) {
			if time.Now().Before(up) {
				return nil, &net.OpError{Op: "dial", Net: "unix", Err: os.ErrNotExist}
			}
			return s.pipes.dial(ctx)
		}
		if err := s.session.reconnect(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.session.register(t.Context()); err != nil {
			t.Error(err)
		}
	})
}
