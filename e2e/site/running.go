package site

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Running is a command of a home's that has been started.
type Running struct {
	cmd   *exec.Cmd
	out   output
	ended chan struct{}
}

// output collects what a command prints while it runs.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// StartBuildx starts the plugin. If it still runs when the test ends, it is
// killed.
func (h *Home) StartBuildx(tb TB, args ...string) *Running {
	tb.Helper()
	return h.Start(tb, nil, append([]string{filepath.Join(h.site.bin, "docker-buildx")}, args...)...)
}

// Start starts a command with a standard input, nil for none; the caller closes
// it. If the command still runs when the test ends, it is killed.
func (h *Home) Start(tb TB, stdin *os.File, args ...string) *Running {
	tb.Helper()
	r := &Running{cmd: h.Command(tb.Context(), args...), ended: make(chan struct{})}
	r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.out
	if stdin != nil {
		r.cmd.Stdin = stdin
	}
	if err := r.cmd.Start(); err != nil {
		tb.Fatalf("%s: %v", strings.Join(args, " "), err)
	}
	go func() {
		_ = r.cmd.Wait()
		close(r.ended)
	}()
	tb.Cleanup(func() {
		_ = syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL)
		<-r.ended
	})
	return r
}

// Output is what the command has printed so far.
func (r *Running) Output() string { return r.out.String() }

// Ended is closed when the command has ended.
func (r *Running) Ended() <-chan struct{} { return r.ended }

// Killed reports whether SIGKILL ended the command, which has ended.
func (r *Running) Killed() bool {
	<-r.ended
	status, ok := r.cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == syscall.SIGKILL
}

// Pid is the command's process id; it leads a process group of its own.
func (r *Running) Pid() int { return r.cmd.Process.Pid }

// WaitOutput waits until the command has printed text.
func (r *Running) WaitOutput(tb TB, text string) {
	tb.Helper()
	deadline := time.After(time.Minute)
	for !strings.Contains(r.Output(), text) {
		select {
		case <-r.ended:
			if !strings.Contains(r.Output(), text) {
				tb.Fatalf("the command ended before it printed %q:\n%s", text, r.Output())
			}
		case <-deadline:
			tb.Fatalf("the command did not print %q within a minute:\n%s", text, r.Output())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Wait waits for the command's end and returns what it did.
func (r *Running) Wait(tb TB) Result {
	tb.Helper()
	Eventually(tb, "the command has ended", func() bool {
		select {
		case <-r.ended:
			return true
		default:
			return false
		}
	})
	return Result{Out: r.Output(), Code: r.cmd.ProcessState.ExitCode()}
}

// Interrupt does what Ctrl-C does, and waits for the command's end.
func (r *Running) Interrupt(tb TB) Result {
	tb.Helper()
	if err := syscall.Kill(-r.cmd.Process.Pid, syscall.SIGINT); err != nil && !errors.Is(err, syscall.ESRCH) {
		tb.Errorf("interrupt: %v", err)
	}
	return r.Wait(tb)
}
