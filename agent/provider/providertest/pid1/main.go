// The pid1 command is the machine that package providertest launches: it has
// the surroundings of a machine agent (see package machine) and keeps its part
// of the contract, without a control plane and without buildkitd.
//
// It holds the descriptors that it inherited, serves the listening socket, and
// on TERM says in /run/depot/state/exit.json that it ended cleanly. A client
// sends one line of JSON, a [request], and reads one, an [answer].
package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"
)

type request struct {
	// Do is about, stat, read, write, linger, stubborn or crash.
	Do   string
	Path string
	Text string
}

type answer struct {
	Text  string
	Mode  os.FileMode
	Error string
	// PID is this process's, Started when it began, Inherited the number of
	// its descriptors from LISTEN_FDS.
	PID       int
	Started   time.Time
	Inherited string
}

type machine struct {
	started  time.Time
	stubborn atomic.Bool
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "pid1:", err)
		os.Exit(1)
	}
}

func run() error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	if len(os.Args) == 2 && os.Args[1] == "linger" {
		for range signals { // not moved by TERM
			continue
		}
	}
	m := &machine{started: time.Now()}
	listener, err := net.FileListener(os.NewFile(3, "clients"))
	if err != nil {
		return fmt.Errorf("descriptor 3: %w", err)
	}
	go m.serve(listener)
	for range signals {
		if !m.stubborn.Load() {
			break
		}
	}
	return finish()
}

// finish tells how the machine ended, whole or not at all.
func finish() error {
	path := filepath.Join("/run/depot/state", "exit.json")
	if err := os.WriteFile(path+".next", []byte(`{"clean":true}`), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".next", path)
}

func (m *machine) serve(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, "pid1: accept:", err)
			os.Exit(1)
		}
		go m.answer(conn)
	}
}

func (m *machine) answer(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	var r request
	if err := json.NewDecoder(conn).Decode(&r); err != nil {
		return
	}
	a := answer{PID: os.Getpid(), Started: m.started, Inherited: os.Getenv("LISTEN_FDS")}
	if err := m.do(r, &a); err != nil {
		a.Error = err.Error()
	}
	_ = json.NewEncoder(conn).Encode(a)
}

func (m *machine) do(r request, a *answer) error {
	switch r.Do {
	case "about":
	case "stat":
		info, err := os.Stat(r.Path)
		if err != nil {
			return err
		}
		a.Mode = info.Mode()
	case "read":
		data, err := os.ReadFile(r.Path)
		a.Text = string(data)
		return err
	case "write":
		return os.WriteFile(r.Path, []byte(r.Text), 0o600)
	case "linger":
		// A process of a build step that outlives its step.
		child := exec.Command("/proc/self/exe", "linger") //nolint:noctx // it is to outlive everything but the machine
		child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		return child.Start()
	case "stubborn":
		m.stubborn.Store(true)
	case "crash":
		os.Exit(7)
	default:
		return fmt.Errorf("unknown request %q", r.Do)
	}
	return nil
}
