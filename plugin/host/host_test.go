package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test's own program, under the names of the two daemons, listens where
// the daemons would. It stands in for how they start, get ready and end; what
// they do beyond is tested with the real ones.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case controlPlaneProgram:
		os.Exit(serveReady("--ops-listen")) //nolint:forbidigo // the main of a test program
	case agentProgram:
		os.Exit(serveReady("--health-address")) //nolint:forbidigo // the main of a test program
	}
	os.Exit(m.Run()) //nolint:forbidigo // the main of a test program
}

func serveReady(flag string) int {
	if at := slices.Index(os.Args, "--token-file"); at > 0 {
		text, err := os.ReadFile(os.Args[at+1]) //nolint:gosec // the test's own argument
		fmt.Fprintln(os.Stderr, "token", strings.TrimSpace(string(text)), err)
	}
	if slices.Contains(os.Args, "--break") {
		fmt.Fprintln(os.Stderr, "the reason why it broke")
		return 3
	}
	address := os.Args[slices.Index(os.Args, flag)+1]
	http.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok") }) //nolint:errcheck,gosec // the test sees it
	fmt.Fprintln(os.Stderr, http.ListenAndServe(address, nil))                                           //nolint:gosec // a test's server
	return 1
}

// newConfig is a host with the two programs, and free ports.
func newConfig(t *testing.T) Config {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("these tests start daemons as other users: run them as root")
	}
	dir, err := os.MkdirTemp("/tmp", "depot-host-") //nolint:usetesting // t.TempDir may be closed to other users
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // where any user can pass
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "bin")
	for _, name := range []string{controlPlaneProgram, agentProgram} {
		copyTestProgram(t, filepath.Join(bin, name))
	}
	c := Config{
		DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"), BinDir: bin,
		Address: "127.0.0.1", ClientPort: freePort(t), AgentPort: freePort(t), OpsPort: freePort(t), HealthPort: freePort(t),
		User: "nobody", Say: t.Logf,
	}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		_, agentErr := c.StopAgent(ctx)
		_, serverErr := c.StopControlPlane(ctx)
		if err := errors.Join(agentErr, serverErr, os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	return c
}

func copyTestProgram(t *testing.T, to string) {
	t.Helper()
	text, err := os.ReadFile(os.Args[0]) //nolint:gosec // the test's own program
	if err == nil {
		err = errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.WriteFile(to, text, 0o755)) //nolint:gosec // a program for any user
	}
	if err != nil {
		t.Fatal(err)
	}
}

// nextPort makes each test's ports differ. They lie below the range that the
// kernel gives to outgoing connections, so that none takes one in between.
var nextPort atomic.Int32 //nolint:gochecknoglobals // shared by parallel tests

func freePort(t *testing.T) int {
	t.Helper()
	const first, count = 20000, 8000
	for range count {
		port := first + (os.Getpid()*16+int(nextPort.Add(1)))%count
		l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", loopback(port))
		if err != nil {
			continue
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		return port
	}
	t.Fatal("no port is free")
	return 0
}

func (c Config) mustStatus(t *testing.T) Status {
	t.Helper()
	s, err := c.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStartStatusStop(t *testing.T) {
	t.Parallel()
	c := newConfig(t)
	ctx := t.Context()
	if err := c.StartControlPlane(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.StartAgent(ctx, "the-token"); err != nil {
		t.Fatal(err)
	}
	first := c.mustStatus(t)
	if !first.ControlPlaneReady || !first.AgentReady {
		t.Errorf("status = %+v, want both ready", first)
	}
	if err := errors.Join(c.StartControlPlane(ctx), c.StartAgent(ctx, "")); err != nil {
		t.Errorf("second start: %v", err)
	}
	if second := c.mustStatus(t); second != first {
		t.Errorf("second start changed the status from %+v to %+v", first, second)
	}
	if uid := uidOf(t, first.ControlPlane); uid == "0" {
		t.Error("the control plane runs as root")
	}
	if uid := uidOf(t, first.Agent); uid != "0" {
		t.Errorf("the agent runs as user %s, want root", uid)
	}
	log, err := os.ReadFile(first.AgentLog)
	if err != nil || !strings.Contains(string(log), "token the-token <nil>") {
		t.Errorf("agent's log = %q, %v, want the token in it", log, err)
	}
	if _, err := os.Stat(filepath.Join(c.RunDir, "agent.token")); !os.IsNotExist(err) {
		t.Errorf("the token's file is still there: %v", err)
	}
	for name, stop := range map[string]func(context.Context) (bool, error){"agent": c.StopAgent, "control plane": c.StopControlPlane} {
		if ran, err := stop(ctx); !ran || err != nil {
			t.Errorf("stop the %s = %t, %v", name, ran, err)
		}
		if ran, err := stop(ctx); ran || err != nil {
			t.Errorf("stop the %s again = %t, %v", name, ran, err)
		}
	}
	if err := c.Purge(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{c.DataDir, c.RunDir} {
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			t.Errorf("%s is left behind: %v", dir, err)
		}
	}
}

// An agent that died is started again as it was: with the same ports, say.
func TestResumeAgent(t *testing.T) {
	t.Parallel()
	c := newConfig(t)
	ctx := t.Context()
	if err := c.ResumeAgent(ctx); err == nil {
		t.Error("ResumeAgent without an earlier start succeeded")
	}
	c.PortRange = "25000-25001"
	if err := c.StartAgent(ctx, ""); err != nil {
		t.Fatal(err)
	}
	before := commandLine(t, c.mustStatus(t).Agent)
	if _, err := c.StopAgent(ctx); err != nil {
		t.Fatal(err)
	}
	c.PortRange = ""
	if err := c.ResumeAgent(ctx); err != nil {
		t.Fatal(err)
	}
	if after := commandLine(t, c.mustStatus(t).Agent); after != before {
		t.Errorf("resumed as %q, want %q", after, before)
	}
}

func commandLine(t *testing.T, pid int) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func uidOf(t *testing.T, pid int) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\nUid:")
	return strings.Fields(rest)[0]
}

func TestStartShowsWhyItEnded(t *testing.T) {
	t.Parallel()
	c := newConfig(t)
	c.AgentArgs = []string{"--break"}
	err := c.StartAgent(t.Context(), "")
	if err == nil || !strings.Contains(err.Error(), "the reason why it broke") {
		t.Errorf("StartAgent = %v, want the end of the log in it", err)
	}
	if s := c.mustStatus(t); s.Agent != 0 {
		t.Errorf("status = %+v, want no agent", s)
	}
}

func TestStartRefusesATakenPort(t *testing.T) {
	t.Parallel()
	c := newConfig(t)
	for name, port := range map[string]int{"clients": c.ClientPort, "agents": c.AgentPort, "health": c.OpsPort} {
		l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", loopback(port))
		if err != nil {
			t.Fatal(err)
		}
		err = c.StartControlPlane(t.Context())
		if err == nil || !strings.Contains(err.Error(), "another program listens on "+loopback(port)) {
			t.Errorf("StartControlPlane with the port for %s taken = %v, want a refusal that names the port", name, err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A pid file whose number now belongs to another process leads to no signal.
func TestReusedPidIsNotSignalled(t *testing.T) {
	t.Parallel()
	c := newConfig(t)
	other := exec.CommandContext(t.Context(), "sleep", "60")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		other.Process.Kill() //nolint:errcheck,gosec // it may have ended
		other.Wait()         //nolint:errcheck,gosec // it was killed
	})
	r, err := recordOf(other.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*record){
		"other start": func(r *record) { r.Started-- },
		"other boot":  func(r *record) { r.Boot = "another" },
	} {
		stale := r
		change(&stale)
		text, err := json.Marshal(stale)
		if err == nil {
			err = errors.Join(os.MkdirAll(c.RunDir, 0o755), os.WriteFile(c.agent().pidFile, text, 0o600)) //nolint:gosec // a test's directory
		}
		if err != nil {
			t.Fatal(err)
		}
		if ran, err := c.StopAgent(t.Context()); ran || err != nil {
			t.Errorf("%s: StopAgent = %t, %v, want nothing to stop", name, ran, err)
		}
		if err := unix.Kill(other.Process.Pid, 0); err != nil {
			t.Errorf("%s: the other process was ended: %v", name, err)
		}
	}
}

func TestDamagedPidFileIsNamed(t *testing.T) {
	t.Parallel()
	c := newConfig(t)
	path := c.agent().pidFile
	if err := errors.Join(os.MkdirAll(c.RunDir, 0o755), os.WriteFile(path, []byte("x"), 0o600)); err != nil { //nolint:gosec // a test's directory
		t.Fatal(err)
	}
	if _, err := c.Status(t.Context()); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("Status = %v, want the file's name in it", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// A program in a closed directory is copied to where its user can run it, and
// with closed data the control plane stays root's.
func TestClosedDirectories(t *testing.T) {
	t.Parallel()
	c := newConfig(t)
	if err := os.Chmod(c.BinDir, 0o700); err != nil { //nolint:gosec // closed on purpose
		t.Fatal(err)
	}
	if err := c.StartControlPlane(t.Context()); err != nil {
		t.Fatal(err)
	}
	if uid := uidOf(t, c.mustStatus(t).ControlPlane); uid == "0" {
		t.Error("the control plane runs as root")
	}
	if _, err := c.StopControlPlane(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(c.DataDir, 0o700); err != nil { //nolint:gosec // closed on purpose
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := c.StartControlPlane(ctx); err != nil {
		t.Fatal(err)
	}
	if uid := uidOf(t, c.mustStatus(t).ControlPlane); uid != "0" {
		t.Errorf("the control plane runs as user %s in a directory that is closed to it", uid)
	}
}

func TestMountsBelow(t *testing.T) {
	t.Parallel()
	found, err := mountsBelow("/proc")
	if err != nil || !slices.Contains(found, "/proc") {
		t.Errorf("mountsBelow(/proc) = %q, %v, want /proc in it", found, err)
	}
}
