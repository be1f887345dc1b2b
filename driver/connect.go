package driver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	bkclient "github.com/moby/buildkit/client"
	"github.com/opendepot/depot/internal/mtls"
	"google.golang.org/grpc"
)

// Times of a connection to a machine.
const (
	dialTimeout     = 5 * time.Second
	connectPatience = 15 * time.Second // for a machine that was ready a moment ago
	connectRetry    = 200 * time.Millisecond
)

func keepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}
}

// unreachableError reports a machine that is ready but does not let this
// client in.
type unreachableError struct {
	machine, address string
	err              error
}

func (e *unreachableError) Error() string {
	return fmt.Sprintf("machine %s at %s is ready but cannot be reached from here: %v. "+
		"Check that this host can connect to the agent's advertised address and port range; `docker depot doctor` tests each link", e.machine, e.address, e.err)
}

func (e *unreachableError) Unwrap() error { return e.err }

// dial connects to the lease's machine once.
func (l *lease) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	raw, err := newDialer().DialContext(ctx, "tcp", l.address)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, mtls.Client{
		Identity:   l.identity,
		Anchors:    l.anchors,
		ServerName: l.serverName,
		Address:    l.address,
		NextProtos: []string{"h2"},
		Time:       l.now,
	}.Config())
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	return conn, nil
}

// patiently repeats try until it succeeds, the lease or ctx ends, or
// connectPatience is over.
func (l *lease) patiently(ctx context.Context, try func(context.Context) error) error {
	began := time.Now()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		if time.Since(began) > connectPatience {
			return &unreachableError{l.machine, l.address, err}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-l.ended:
			return l.err()
		case <-time.After(connectRetry):
		}
	}
}

// link is the transport of one BuildKit client: it dials the lease's machine
// anew whenever gRPC asks, and knows whether a connection broke.
type link struct {
	lease  *lease
	breaks atomic.Int64
	// answered says that the machine has answered a call; down that the last
	// connection broke, or could not be made.
	answered atomic.Bool
	down     atomic.Bool

	mu    sync.Mutex
	spare net.Conn // dialled ahead; guarded by mu
}

// reach dials ahead, so that the first failure is seen as what it is.
func (k *link) reach(ctx context.Context) error {
	return k.lease.patiently(ctx, func(ctx context.Context) error {
		conn, err := k.lease.dial(ctx)
		if err != nil {
			return err
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		k.spare = conn
		return nil
	})
}

// Dial is gRPC's dialer.
func (k *link) dial(ctx context.Context, _ string) (net.Conn, error) {
	k.mu.Lock()
	conn := k.spare
	k.spare = nil
	k.mu.Unlock()
	if conn == nil {
		if err := k.lease.err(); err != nil {
			return nil, err
		}
		var err error
		if conn, err = k.lease.dial(ctx); err != nil {
			k.down.Store(true)
			return nil, err
		}
	}
	k.down.Store(false)
	return &linkConn{Conn: conn, broke: sync.OnceFunc(func() {
		k.breaks.Add(1)
		k.down.Store(true)
	})}, nil
}

// close ends a spare connection that nobody took.
func (k *link) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.spare != nil {
		k.spare.Close() //nolint:errcheck,gosec // nothing was sent on it
		k.spare = nil
	}
}

// linkConn counts its end. gRPC closes a connection that broke.
type linkConn struct {
	net.Conn
	broke func()
}

func (c *linkConn) Close() error {
	c.broke()
	return c.Conn.Close()
}

// client returns a BuildKit client that has completed one call.
func (k *link) client(ctx context.Context, opts []bkclient.ClientOpt) (*bkclient.Client, error) {
	if err := k.reach(ctx); err != nil {
		return nil, err
	}
	defer k.close()
	opts = append(opts,
		bkclient.WithContextDialer(k.dial),
		bkclient.WithGRPCDialOption(grpc.WithAuthority(k.lease.serverName)),
		bkclient.WithGRPCDialOption(grpc.WithChainUnaryInterceptor(k.unary)),
		bkclient.WithGRPCDialOption(grpc.WithChainStreamInterceptor(k.stream)),
	)
	c, err := bkclient.New(ctx, "tcp://"+k.lease.address, opts...)
	if err != nil {
		return nil, err
	}
	err = k.lease.patiently(ctx, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, dialTimeout)
		defer cancel()
		_, err := c.Info(ctx)
		return err
	})
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}
