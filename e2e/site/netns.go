package site

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Netns is a network namespace that a test made.
type Netns struct {
	Name string
}

var netnsCount atomic.Int64 //nolint:gochecknoglobals // names have to be unique in the process

// NewNetns makes a network namespace with loopback up; it goes with the test.
func NewNetns(tb TB) *Netns {
	tb.Helper()
	n := &Netns{Name: fmt.Sprintf("depot-e2e-%d-%d", os.Getpid(), netnsCount.Add(1))}
	run(tb, "ip", "netns", "add", n.Name)
	tb.Cleanup(func() {
		if err := try("ip", "netns", "del", n.Name); err != nil {
			tb.Errorf("remove network namespace: %v", err)
		}
	})
	run(tb, "ip", "-n", n.Name, "link", "set", "lo", "up")
	return n
}

// Path is the namespace's file.
func (n *Netns) Path() string { return "/run/netns/" + n.Name }

// Enter returns the arguments that run a program in the namespace: the program
// takes nsenter's place, so its process id is that of the command.
func (n *Netns) Enter(args ...string) []string {
	return append([]string{"nsenter", "--net=" + n.Path(), "--"}, args...)
}

// IP runs `ip` in the namespace.
func (n *Netns) IP(tb TB, args ...string) string {
	tb.Helper()
	return run(tb, append([]string{"ip", "-n", n.Name}, args...)...)
}

// Run runs a program of the system in the namespace to its end.
func (n *Netns) Run(tb TB, args ...string) string {
	tb.Helper()
	return run(tb, n.Enter(args...)...)
}

// Link makes a veth pair between n and other, with the addresses (CIDR) given.
func (n *Netns) Link(tb TB, name, addr string, other *Netns, otherName, otherAddr string) {
	tb.Helper()
	run(tb, "ip", "link", "add", name, "netns", n.Name, "type", "veth", "peer", "name", otherName, "netns", other.Name)
	n.IP(tb, "addr", "add", addr, "dev", name)
	n.IP(tb, "link", "set", name, "up")
	other.IP(tb, "addr", "add", otherAddr, "dev", otherName)
	other.IP(tb, "link", "set", otherName, "up")
}

// Dial connects from inside the namespace.
func (n *Netns) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var conn net.Conn
	err := n.inside(func() (err error) {
		// A literal address: a name would be looked up by other threads.
		conn, err = (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// Listen listens inside the namespace.
func (n *Netns) Listen(ctx context.Context, network, addr string) (net.Listener, error) {
	var l net.Listener
	err := n.inside(func() (err error) {
		l, err = new(net.ListenConfig).Listen(ctx, network, addr)
		return err
	})
	return l, err
}

// inside runs fn on a thread that is in the namespace. The thread ends with
// it, as it could not be trusted to be back where it was.
func (n *Netns) inside(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		f, err := os.Open(n.Path())
		if err != nil {
			done <- err
			return
		}
		defer f.Close() //nolint:errcheck // only read
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter network namespace %s: %w", n.Name, err)
			return
		}
		done <- fn()
	}()
	return <-done
}
