// Package site sets up whole systems for end-to-end tests and benchmarks: a
// control plane, hosts with cloud agents, and clients with homes of their own,
// all of them the real programs in processes of their own.
//
// A [Site] lives in network namespaces that it makes, with nothing in them but
// loopback and what the test adds, so that sites do not meet each other or the
// machine that they run on. At its end a site stops all that it started and
// fails the test if anything is left: a process, a mount, a loop device, a
// network device, a firewall rule, a cgroup.
package site

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// TB is what a site needs of a test; testing.TB has it.
type TB interface {
	Helper()
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Failed() bool
	Cleanup(fn func())
	TempDir() string
	Context() context.Context
}

// Config says what a site is like. The zero value is one network namespace
// with everything in it.
type Config struct {
	// ControlPlaneNet, HostNet and ClientNet are where the three live; nil
	// means one namespace for all that are nil.
	ControlPlaneNet *Netns
	HostNet         *Netns
	ClientNet       *Netns
	// ControlPlaneAddress is where agents and clients reach the control plane;
	// empty means 127.0.0.1.
	ControlPlaneAddress string
	// Serve are further flags for depot-controlplane serve.
	Serve []string
}

// Site is a whole system.
type Site struct {
	Config
	// Dir is the site's directory.
	Dir          string
	ControlPlane *Process
	tb           TB
	bin          string
	hosts        []*Host
}

// Bin returns the directory of the built programs; DEPOT_BIN names it.
func Bin(tb TB) string {
	tb.Helper()
	dir := os.Getenv("DEPOT_BIN") //nolint:forbidigo // as a test has no main
	if dir == "" {
		tb.Fatalf("DEPOT_BIN is not set: run the tests with `make test` or `make e2e`, or set it to the directory of the built programs")
	}
	return dir
}

// Deps returns the directory of third-party programs; DEPOT_DEPS names it.
func Deps(tb TB) string {
	tb.Helper()
	dir := os.Getenv("DEPOT_DEPS") //nolint:forbidigo // as a test has no main
	if dir == "" {
		tb.Fatalf("DEPOT_DEPS is not set: run the tests with `make test` or `make e2e`, or set it to the directory that `make deps` fills")
	}
	return dir
}

// New makes a site with a control plane that is ready.
func New(tb TB, c Config) *Site {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Fatalf("end-to-end tests need root: they make namespaces and mounts; `make test-unit` runs the rest")
	}
	s := &Site{Config: c, Dir: tb.TempDir(), tb: tb, bin: Bin(tb)}
	tb.Cleanup(s.checkLeaks)
	if s.ControlPlaneNet == nil || s.HostNet == nil || s.ClientNet == nil {
		shared := NewNetns(tb)
		for _, n := range []**Netns{&s.ControlPlaneNet, &s.HostNet, &s.ClientNet} {
			if *n == nil {
				*n = shared
			}
		}
	}
	if s.ControlPlaneAddress == "" {
		s.ControlPlaneAddress = "127.0.0.1"
	}
	s.ControlPlane = s.process("controlplane", s.ControlPlaneNet, append([]string{
		filepath.Join(s.bin, "depot-controlplane"), "serve",
		"--data-dir", s.ControlPlaneDir(),
		"--client-listen", s.ControlPlaneAddress + ":8443",
		"--agent-listen", s.ControlPlaneAddress + ":8444",
		"--ops-listen", "127.0.0.1:8445",
		"--log-level", "debug",
	}, c.Serve...)...)
	tb.Cleanup(func() { s.ControlPlane.Stop(tb) })
	s.StartControlPlane(tb)
	return s
}

// ControlPlaneDir is the control plane's data directory.
func (s *Site) ControlPlaneDir() string { return filepath.Join(s.Dir, "controlplane") }

// URL is where clients reach the control plane.
func (s *Site) URL() string { return "https://" + s.ControlPlaneAddress + ":8443" }

// AgentURL is where agents reach the control plane.
func (s *Site) AgentURL() string { return "https://" + s.ControlPlaneAddress + ":8444" }

// StartControlPlane starts the control plane and waits until it is ready.
func (s *Site) StartControlPlane(tb TB) {
	tb.Helper()
	s.ControlPlane.Start(tb)
	s.ControlPlane.WaitLog(tb, "control plane ready")
}

// AdminToken is the first administrator's token.
func (s *Site) AdminToken(tb TB) string {
	tb.Helper()
	b, err := os.ReadFile(filepath.Join(s.ControlPlaneDir(), "admin-token"))
	if err != nil {
		tb.Fatalf("read the administrator's token: %v", err)
	}
	return strings.TrimSpace(string(b))
}

// Process is one of the site's programs; it can be started again after it
// ended. Its log, of all its lives, is in a file.
type Process struct {
	Name string
	// Args are the program and its arguments; Env is its environment, nil for
	// the test's own without DEPOT_ variables.
	Args []string
	Env  []string
	net  *Netns
	log  string

	mu    sync.Mutex // guards what is below
	cmd   *exec.Cmd
	ended chan struct{}
	begin int64 // where the log of this life begins
}

func (s *Site) process(name string, net *Netns, args ...string) *Process {
	return &Process{Name: name, Args: args, net: net, log: filepath.Join(s.Dir, name+".log")}
}

// Start starts the program.
func (p *Process) Start(tb TB) {
	tb.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		tb.Fatalf("log of %s: %v", p.Name, err)
	}
	defer log.Close() //nolint:errcheck // the program has its own descriptor
	if info, err := log.Stat(); err == nil {
		p.begin = info.Size()
	}
	args := p.net.Enter(p.Args...)
	cmd := exec.Command(args[0], args[1:]...) //nolint:gosec,noctx // ended by Stop or Kill, after the test's context
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = p.Env
	if cmd.Env == nil {
		cmd.Env = Environ()
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		tb.Fatalf("start %s: %v", p.Name, err)
	}
	ended := make(chan struct{})
	p.cmd, p.ended = cmd, ended
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
}

// Environ is the test's environment without what depot and docker would read.
func Environ() []string {
	var env []string
	for _, kv := range os.Environ() {
		if strings.HasPrefix(kv, "DEPOT_") || strings.HasPrefix(kv, "DOCKER_") || strings.HasPrefix(kv, "BUILD") ||
			strings.HasPrefix(kv, "CI=") || strings.HasPrefix(kv, "HOME=") || strings.HasPrefix(kv, "XDG_") {
			continue
		}
		env = append(env, kv)
	}
	return env
}

// Pid is the process id of the program's present life.
func (p *Process) Pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd.Process.Pid
}

// Ended is closed when the program's present life has ended.
func (p *Process) Ended() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ended
}

// Running reports whether the program was started and has not ended.
func (p *Process) Running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return false
	}
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// Kill ends the program with SIGKILL and waits until it is gone.
func (p *Process) Kill(tb TB) { tb.Helper(); p.signal(tb, syscall.SIGKILL) }

// Stop ends the program with SIGTERM and waits until it is gone. One that does
// not run is fine.
func (p *Process) Stop(tb TB) { tb.Helper(); p.signal(tb, syscall.SIGTERM) }

func (p *Process) signal(tb TB, sig syscall.Signal) {
	tb.Helper()
	p.mu.Lock()
	cmd, ended := p.cmd, p.ended
	p.mu.Unlock()
	if cmd == nil {
		return
	}
	if err := cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		tb.Errorf("signal %s: %v", p.Name, err)
	}
	select {
	case <-ended:
	case <-time.After(30 * time.Second):
		_ = cmd.Process.Kill()
		<-ended
		tb.Errorf("%s did not end within 30s of %s; its log:\n%s", p.Name, sig, p.Log())
	}
}

// Log is what the program has logged in its present life.
func (p *Process) Log() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return string(b[min(p.begin, int64(len(b))):])
}

// WaitLog waits until the program has logged text in its present life.
func (p *Process) WaitLog(tb TB, text string) {
	tb.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for !strings.Contains(p.Log(), text) {
		select {
		case <-p.Ended():
			if !strings.Contains(p.Log(), text) {
				tb.Fatalf("%s ended before it logged %q:\n%s", p.Name, text, p.Log())
			}
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			tb.Fatalf("%s did not log %q within 60s:\n%s", p.Name, text, p.Log())
		}
	}
}

// Eventually waits until cond holds, and fails the test with what it is about
// if it does not within a minute.
func Eventually(tb TB, what string, cond func() bool) {
	tb.Helper()
	if !within(time.Minute, cond) {
		tb.Fatalf("not within a minute: %s", what)
	}
}

// within asks until cond holds, and reports whether it did in time.
func within(limit time.Duration, cond func() bool) bool {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(limit); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// run runs a command of the system to its end and fails the test if it fails.
func run(tb TB, args ...string) string {
	tb.Helper()
	cmd := exec.Command(args[0], args[1:]...) //nolint:gosec,noctx // short, and needed after the test's context
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		tb.Fatalf("%s: %v: %s", strings.Join(args, " "), err, errOut.String())
	}
	return string(out)
}

func try(args ...string) error {
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput() //nolint:gosec,noctx // short, and needed after the test's context
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}
