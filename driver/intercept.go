package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	control "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// explainPatience is how long a call that met a broken connection waits for
// the server to say what became of the machine: its agent sees the end of it
// within seconds.
const explainPatience = 5 * time.Second

// brokenError ends a call whose connection broke, where the server has not
// said why.
type brokenError struct {
	machine string
	err     error
}

func (e *brokenError) Error() string {
	return fmt.Sprintf("the connection to machine %s broke: %v. The server has not said that the machine ended; "+
		"its cache is kept. Build again, and see `docker depot machine inspect %s`", e.machine, e.err, e.machine)
}

func (e *brokenError) Unwrap() error { return e.err }

// unary follows solves, and explains broken connections.
func (k *link) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if solve, ok := req.(*control.SolveRequest); ok {
		var done func()
		ctx, done = k.lease.track(ctx, solve.GetRef())
		defer done()
	}
	before := k.breaks.Load()
	err := invoke(ctx, method, req, reply, cc, opts...)
	if err == nil {
		k.answered.Store(true)
	}
	return k.explain(ctx, before, err)
}

// stream explains broken connections.
func (k *link) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) { //nolint:ireturn // gRPC's interface
	before := k.breaks.Load()
	s, err := open(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, k.explain(ctx, before, err)
	}
	return explained{s, func(err error) error { return k.explain(ctx, before, err) }}, nil
}

// explained is a stream whose end is explained.
type explained struct {
	grpc.ClientStream
	explain func(error) error
}

// RecvMsg receives a message.
func (s explained) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return s.explain(err)
}

// explain says why a call ended, if it was not by its own fault: the lease or
// the build was ended from elsewhere, the connection broke since the call began,
// or it was broken then and could not be made again. Before the machine's first
// answer there is nothing to explain.
func (k *link) explain(ctx context.Context, before int64, err error) error {
	if err == nil {
		return nil
	}
	var (
		ended     *endedError
		cancelled *cancelledError
	)
	if cause := context.Cause(ctx); errors.As(cause, &ended) || errors.As(cause, &cancelled) {
		return cause
	}
	lost := k.breaks.Load() != before || k.answered.Load() && k.down.Load()
	if status.Code(err) != codes.Unavailable || !lost {
		return err
	}
	t := time.NewTimer(explainPatience)
	defer t.Stop()
	select {
	case <-k.lease.ended:
		return k.lease.err()
	case <-ctx.Done():
		return err
	case <-t.C:
		return &brokenError{k.lease.machine, err}
	}
}
