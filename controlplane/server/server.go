// Package server is the wire side of the control plane: it turns the protocol
// of controlplane/api into transactions on the store, and back.
//
// It decides nothing about machines: a call stores what its caller asked for
// or saw, announces the scope, and hangs until the scheduler's answer is in the
// store. Every call passes one gate (see [gate]) that authenticates, checks the
// right that the call needs, and maps errors to codes in one place.
//
// Three handlers stand for three listeners: [Server.Clients] for drivers and
// people's tools, [Server.Agents] for cloud agents and machines, and
// [Server.Ops] for health and metrics, on loopback.
package server

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"github.com/opendepot/depot/controlplane"
	"github.com/opendepot/depot/controlplane/api/depot/v1/depotv1connect"
)

// Config is what a server needs. All fields are required, but for Version.
type Config struct {
	Store         controlplane.Store
	Authority     controlplane.Authority
	Authenticator controlplane.Authenticator
	Times         controlplane.Times
	Sizes         []controlplane.Size
	// Now is a clock that no jump of the wall clock moves.
	Now func() time.Time
	// Record is the control plane's own record, as it was at start.
	Record controlplane.Server
	// JoinKey is the opened key of machines' join tokens.
	JoinKey []byte
	Version string
	Log     *slog.Logger
}

// Server answers calls. Make it with [New].
type Server struct {
	Config
	metrics  *metrics
	sessions sessions
	// ahead is the highest epoch of this server's that an agent knows and that
	// is above ours: this store was restored from a backup.
	ahead atomic.Uint64
}

// New returns a server.
func New(c Config) *Server {
	return &Server{Config: c, metrics: newMetrics(), sessions: sessions{byAgent: make(map[string]*session)}}
}

// What is read of a request, before anything is known of its sender.
const (
	// maxCallBytes bounds a call of anybody but an agent, and maxReportBytes an
	// agent's, which lists all that it has.
	maxCallBytes   = 256 << 10
	maxReportBytes = 8 << 20
	// bodyTimeout is how long a request may take to arrive.
	bodyTimeout = 30 * time.Second
)

// Clients returns the handler of the listener for clients.
func (s *Server) Clients() http.Handler {
	mux := http.NewServeMux()
	opts := s.handlerOptions(maxCallBytes)
	mux.Handle(depotv1connect.NewBuilderServiceHandler(&builderService{s}, opts...))
	mux.Handle(depotv1connect.NewAdminServiceHandler(&adminService{s}, opts...))
	mux.HandleFunc("GET /healthz", healthy)
	return bounded(withBearer(mux))
}

// Agents returns the handler of the listener for cloud agents and machines.
func (s *Server) Agents() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(depotv1connect.NewMachineServiceHandler(&machineService{s}, s.handlerOptions(maxCallBytes)...))
	mux.Handle(depotv1connect.NewAgentServiceHandler(&agentService{s}, s.handlerOptions(maxReportBytes)...))
	mux.HandleFunc("GET /healthz", healthy)
	return bounded(s.withIdentity(mux))
}

// Ops returns the handler of the loopback listener: /healthz, /readyz, /metrics.
func (s *Server) Ops() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", healthy)
	mux.HandleFunc("GET /readyz", s.ready)
	mux.Handle("GET /metrics", s.metrics.handler())
	return mux
}

func (s *Server) handlerOptions(maxBytes int) []connect.HandlerOption {
	return []connect.HandlerOption{
		connect.WithInterceptors(gate{s}),
		connect.WithReadMaxBytes(maxBytes),
		connect.WithRecover(recovered),
	}
}

// bounded gives a request a time to arrive in; after it, a call may hang.
func bounded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn := http.NewResponseController(w)
		// Where no deadline can be set there is no network either.
		_ = conn.SetReadDeadline(time.Now().Add(bodyTimeout))
		r.Body = &timedBody{ReadCloser: r.Body, arrived: func() { _ = conn.SetReadDeadline(time.Time{}) }}
		next.ServeHTTP(w, r)
	})
}

// timedBody tells when all of it has been read.
type timedBody struct {
	io.ReadCloser
	arrived func()
}

func (b *timedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if errors.Is(err, io.EOF) {
		b.arrived()
	}
	return n, err
}

func healthy(w http.ResponseWriter, _ *http.Request) {
	_, _ = w.Write([]byte("ok\n"))
}

// ready answers 200 when calls can be served: the store answers, and no agent
// knows a later state of it.
func (s *Server) ready(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 2*time.Second)
	defer cancel()
	err := s.Store.View(ctx, func(tx controlplane.Tx) error {
		_, err := tx.Server(ctx)
		return err
	})
	if ahead := s.ahead.Load(); err == nil && ahead > 0 {
		err = restoredError(ahead, s.Record.Epoch)
	}
	if err != nil {
		s.Log.WarnContext(ctx, "not ready", "err", err)
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	_, _ = w.Write([]byte("ready\n"))
}

// Run does what no call does: it notes which agents have fallen silent. It ends
// with ctx.
func (s *Server) Run(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			for _, id := range s.sessions.silent(s.Now(), s.Times.AgentSilent) {
				if err := s.disconnectAgent(ctx, id); err != nil && ctx.Err() == nil {
					s.Log.ErrorContext(ctx, "note a silent agent", "agent", id, "err", err)
				}
			}
		}
	}
}

// newID makes an id.
func (s *Server) newID(kind controlplane.Kind) string {
	return controlplane.NewID(kind, s.Now(), rand.Reader)
}

// hang waits until the watcher has something, the time is over (true both), or
// ctx ends (false).
func hang(ctx context.Context, w controlplane.Watcher, until <-chan time.Time) (again bool) {
	select {
	case <-ctx.Done():
		return false
	case <-until:
		return false
	case <-w.C():
		w.Take()
		return true
	}
}

// gone reports whether the caller is not there any more.
func gone(ctx context.Context) bool { return errors.Is(ctx.Err(), context.Canceled) }
