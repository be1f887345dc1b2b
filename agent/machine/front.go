package machine

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/internal/mtls"
)

// The front's bounds.
const (
	// handshakeTimeout ends a client that does not get on with TLS.
	handshakeTimeout = 10 * time.Second
	// maxHandshakes bounds the handshakes at once; more wait in the socket's
	// backlog, where they cost nothing.
	maxHandshakes = 128
	// acceptPause is waited after an error that may pass (no descriptors left).
	acceptPause = 100 * time.Millisecond
	// deadPeer is after how long without an acknowledgement a peer is given up
	// (TCP_USER_TIMEOUT), so that a client whose host vanished frees its lease.
	deadPeer = 30 * time.Second
)

// front serves TLS to clients and passes the bytes to buildkitd's unix socket.
// It accepts from the first moment to the last: while nobody may in, a
// connection is reset at once rather than left in the backlog, whose socket
// outlives this process.
type front struct {
	listener net.Listener
	config   *tls.Config // a Server of package mtls; see newFront
	leases   *leases
	socket   string // buildkitd's
	log      *slog.Logger
}

func newFront(listener net.Listener, identity *mtls.Identity, anchors *mtls.Anchors, l *leases, socket string, log *slog.Logger) *front {
	config := mtls.Server{
		Identity:   identity,
		Anchors:    anchors,
		Admit:      l.admit,
		NextProtos: []string{"h2"},
	}.Config()
	return &front{listener: listener, config: config, leases: l, socket: socket, log: log}
}

// run accepts until ctx ends, then cuts what is left and waits for it.
func (f *front) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = f.listener.Close() })
	defer stop()
	var clients sync.WaitGroup
	defer clients.Wait()
	defer cancel()
	slots := make(chan struct{}, maxHandshakes)
	for {
		conn, err := f.listener.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				reset(conn)
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return err
		case err != nil:
			f.log.WarnContext(ctx, "accept a client", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(acceptPause):
			}
			continue
		}
		if why := f.leases.denied(); why != "" {
			reset(conn)
			f.log.InfoContext(ctx, "client refused", "peer", conn.RemoteAddr().String(), "err", why)
			continue
		}
		slots <- struct{}{}
		clients.Go(func() {
			f.serve(ctx, conn, func() { <-slots })
		})
	}
}

// serve brings one client in and stays with it until its end. It calls shaken
// when the handshake is over.
func (f *front) serve(ctx context.Context, raw net.Conn, shaken func()) {
	shaken = sync.OnceFunc(shaken)
	defer shaken()
	defer raw.Close() //nolint:errcheck // nothing is left to be sent
	tune(raw)
	conn := tls.Server(raw, f.config)
	shake, cancel := context.WithTimeout(ctx, handshakeTimeout)
	err := conn.HandshakeContext(shake)
	cancel()
	shaken()
	if err != nil {
		f.refused(ctx, raw, err)
		return
	}
	name, err := mtls.ParseLeafName(conn.ConnectionState().PeerCertificates[0])
	if err != nil { // Admit has parsed it before
		f.refused(ctx, raw, err)
		return
	}
	session, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	leave, err := f.leases.enter(name, func(why error) { cut(why) })
	if err != nil {
		f.refused(ctx, raw, err)
		return
	}
	defer leave()
	daemon, err := (&net.Dialer{}).DialContext(session, "unix", f.socket)
	if err != nil {
		f.log.ErrorContext(ctx, "reach buildkitd", "lease", name.Lease, "err", err)
		return
	}
	defer daemon.Close() //nolint:errcheck // nothing is left to be sent
	unix, ok := daemon.(*net.UnixConn)
	if !ok {
		return
	}
	stop := context.AfterFunc(session, func() {
		_ = raw.Close()
		_ = daemon.Close()
	})
	defer stop()
	splice(conn, unix)
	if why := context.Cause(session); why != nil && ctx.Err() == nil {
		f.log.InfoContext(ctx, "connection cut", "lease", name.Lease, "err", why)
	}
}

func (f *front) refused(ctx context.Context, raw net.Conn, err error) {
	attrs := []any{"peer", raw.RemoteAddr().String(), "err", err}
	var refusal *notAdmitted
	if errors.As(err, &refusal) && refusal.name != (mtls.LeafName{}) {
		attrs = append(attrs, "lease", refusal.name.Lease) // err names a foreign machine
	}
	f.log.WarnContext(ctx, "client refused", attrs...)
}

// halfCloser is a connection whose directions end apart.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// splice copies both ways until both have ended. The end of one direction is
// passed on, and the other goes on: a client may have sent all and still wait
// for an answer.
func splice(a, b halfCloser) {
	var ways sync.WaitGroup
	way := func(dst, src halfCloser) {
		buf := buffers.Get().(*[]byte) //nolint:errcheck,forcetypeassert // the pool holds nothing else
		defer buffers.Put(buf)
		// Hiding dst's ReadFrom and src's WriteTo keeps the pooled buffer in
		// use; neither can splice in the kernel, for TLS is between.
		_, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, *buf)
		if err != nil || dst.CloseWrite() != nil {
			// A broken direction ends both: neither peer could tell how far
			// the other came.
			_ = a.Close()
			_ = b.Close()
		}
	}
	ways.Go(func() { way(a, b) })
	way(b, a)
	ways.Wait()
}

// bufferSize is that of a direction's buffer. Measured with BenchmarkFront, 16
// to 256 kB cost the same CPU time, and so does reading ahead of crypto/tls: a
// record, the most that it hands out at once, has 16 kB.
const bufferSize = 64 << 10

//nolint:gochecknoglobals // a pool is of use only if shared
var buffers = sync.Pool{New: func() any {
	b := make([]byte, bufferSize)
	return &b
}}

// tune makes a dead peer show within about half a minute, also while bytes
// are under way to it.
func tune(c net.Conn) {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return
	}
	_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 4})
	raw, err := tcp.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadPeer.Milliseconds()))
	})
}

// reset ends a connection in a way that the client notices at once.
func reset(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}
