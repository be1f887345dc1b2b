package cloud

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// RelaySocket is the name of the relay's socket in its directory.
const RelaySocket = "controlplane.sock"

const (
	// relayConnections bounds the connections of all machines. A machine agent
	// needs one, and one more while it reconnects.
	relayConnections = 1024
	relayDial        = 10 * time.Second
	// relayHalfOpen is how long one direction may live on without the other.
	relayHalfOpen = time.Minute
)

// Relay carries bytes from a unix socket, which machines find in a directory
// that is mounted into them, to the control plane. TLS goes through it end to
// end: the relay can read nothing, and vouches for nobody.
//
// Machines have no route to the control plane but this one. It may be stopped
// and started again: the directory stays, the socket in it is made anew, and
// machine agents reconnect.
type Relay struct {
	// Dir is where the socket is; it is made (mode 0700) where there is none.
	Dir string
	// Dial connects to the control plane.
	Dial func(ctx context.Context) (net.Conn, error)
	// Log must be set.
	Log *slog.Logger
}

// Listen makes the socket anew. One relay at a time has a directory.
func (r *Relay) Listen(ctx context.Context) (net.Listener, error) {
	if err := os.MkdirAll(r.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the relay's directory: %w", err)
	}
	path := filepath.Join(r.Dir, RelaySocket)
	// Under another name first: there is no moment without a socket, and none
	// with a wrong mode.
	fresh := path + temporarySuffix
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("make the relay's socket: %w", err)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "unix", fresh)
	if err != nil {
		return nil, fmt.Errorf("make the relay's socket: %w", err)
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false) // the name may be a later relay's by then
	}
	if err := errors.Join(os.Chmod(fresh, 0o600), os.Rename(fresh, path)); err != nil {
		return nil, errors.Join(fmt.Errorf("make the relay's socket: %w", err), l.Close())
	}
	return l, nil
}

// Serve relays what comes in on l until ctx ends; it closes l, cuts all
// connections and waits for them.
func (r *Relay) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() }) //nolint:errcheck,gosec // ends Accept
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, relayConnections)
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				closeQuietly(conn)
			}
			return nil
		}
		if err != nil { // out of descriptors, most likely
			r.Log.ErrorContext(ctx, "accept a machine's connection", "err", err)
			wait(ctx, time.Second)
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			r.Log.WarnContext(ctx, "too many connections of machines to the control plane", "most", relayConnections)
			closeQuietly(conn)
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			r.relay(ctx, conn)
		})
	}
}

// relay connects one machine's connection to the control plane.
func (r *Relay) relay(ctx context.Context, machine net.Conn) {
	defer closeQuietly(machine)
	dialCtx, cancel := context.WithTimeout(ctx, relayDial)
	server, err := r.Dial(dialCtx)
	cancel()
	if err != nil {
		// The machine agent goes on trying, and the agent's own calls have told.
		r.Log.DebugContext(ctx, "connect a machine to the control plane", "err", err)
		return
	}
	defer closeQuietly(server)
	cut := context.AfterFunc(ctx, func() { closeQuietly(machine); closeQuietly(server) })
	defer cut()
	var wg sync.WaitGroup
	wg.Go(func() { pipe(server, machine) })
	wg.Go(func() { pipe(machine, server) })
	wg.Wait()
}

// pipe copies src to dst, passes the end on, and gives the other direction a
// while to end too.
func pipe(dst, src net.Conn) {
	_, err := io.Copy(dst, src)
	half, ok := dst.(interface{ CloseWrite() error })
	if err != nil || !ok || half.CloseWrite() != nil {
		closeQuietly(dst)
		closeQuietly(src)
		return
	}
	dst.SetReadDeadline(time.Now().Add(relayHalfOpen)) //nolint:errcheck,gosec // a closed connection needs none
}

// closeQuietly closes a connection that nothing more is wanted of.
func closeQuietly(c net.Conn) {
	c.Close() //nolint:errcheck,gosec // see above
}
