package cloud

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// relayed starts a relay to a control plane that says back what it is told,
// once it was told all.
func relayed(t *testing.T, dir string) (stop func()) {
	t.Helper()
	controlPlane, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	go func() {
		for {
			conn, err := controlPlane.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close() //nolint:errcheck // the peer sees it
				text, err := io.ReadAll(conn)
				if err == nil {
					conn.Write(text) //nolint:errcheck,gosec // the peer sees it
				}
			}()
		}
	}()
	r := &Relay{Dir: dir, Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Dial: func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", controlPlane.Addr().String())
	}}
	l, err := r.Listen(t.Context())
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Serve(ctx, l) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		controlPlane.Close() //nolint:errcheck,gosec // the test is over
	}
}

// say connects as a machine does, says text, and returns the answer.
func say(t *testing.T, dir string, text []byte) ([]byte, error) {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(t.Context(), "unix", filepath.Join(dir, RelaySocket))
	if err != nil {
		return nil, err
	}
	defer conn.Close() //nolint:errcheck // nothing more is wanted
	machine, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, errors.New("no unix connection")
	}
	must(t, machine.SetDeadline(time.Now().Add(time.Minute)))
	if _, err := machine.Write(text); err != nil {
		return nil, err
	}
	if err := machine.CloseWrite(); err != nil {
		return nil, err
	}
	return io.ReadAll(machine)
}

func TestRelay(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "relay")
	text := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	stop := relayed(t, dir)
	// The directory is what machines have; it must outlive relays.
	before, err := os.Stat(dir)
	must(t, err)
	for range 3 {
		got, err := say(t, dir, text)
		if err != nil || !bytes.Equal(got, text) {
			t.Errorf("the answer is %d bytes of %d (%v): a half-closed connection must be answered", len(got), len(text), err)
		}
	}
	info, err := os.Stat(filepath.Join(dir, RelaySocket))
	must(t, err)
	if info.Mode().Perm() != 0o600 || before.Mode().Perm() != 0o700 {
		t.Errorf("the socket's mode is %v, the directory's %v", info.Mode(), before.Mode())
	}
	stop()
	if _, err := say(t, dir, text); err == nil {
		t.Error("a relay that was stopped answers")
	}
	stop = relayed(t, dir)
	after, err := os.Stat(dir)
	must(t, err)
	if !os.SameFile(before, after) {
		t.Error("the directory was made anew")
	}
	if got, err := say(t, dir, text); err != nil || !bytes.Equal(got, text) {
		t.Errorf("after a restart the answer is %d bytes (%v)", len(got), err)
	}
	stop()
}

// An open connection is cut when the relay ends, and one that the control
// plane cannot take is closed.
func TestRelayEnds(t *testing.T) {
	dir := t.TempDir()
	stop := relayed(t, dir)
	conn, err := new(net.Dialer).DialContext(t.Context(), "unix", filepath.Join(dir, RelaySocket))
	must(t, err)
	defer conn.Close() //nolint:errcheck // the test is over
	_, err = conn.Write([]byte("x"))
	must(t, err)
	stop()
	must(t, conn.SetDeadline(time.Now().Add(time.Minute)))
	if n, err := conn.Read(make([]byte, 1)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection lives on: %v", err)
	}

	r := &Relay{Dir: dir, Log: slog.New(slog.DiscardHandler), Dial: func(context.Context) (net.Conn, error) {
		return nil, errors.New("the control plane is down")
	}}
	l, err := r.Listen(t.Context())
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Serve(ctx, l) }()
	if got, err := say(t, dir, nil); len(got) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("answered %q, %v", got, err)
	}
	cancel()
	must(t, <-done)
}
