package site

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
)

// PeerAddress is an address of the hosts' namespace that is not loopback: a
// pool reaches what listens there if its agent runs with --allow for it.
const PeerAddress = "198.51.100.1"

// RegistryAddress is where StartRegistry's registry listens. It speaks HTTP.
const RegistryAddress = PeerAddress + ":5000"

// AddPeerAddress gives the hosts' namespace PeerAddress.
func (s *Site) AddPeerAddress(tb TB) {
	tb.Helper()
	s.HostNet.IP(tb, "addr", "add", PeerAddress+"/32", "dev", "lo")
}

// StartRegistry starts an image registry that is not ours, on all addresses of
// the hosts' namespace, and waits until it answers. It goes with the test.
func (s *Site) StartRegistry(tb TB) *Process {
	tb.Helper()
	dir := filepath.Join(s.Dir, "registry")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		tb.Fatalf("registry: %v", err)
	}
	config := filepath.Join(dir, "config.yml")
	text := "version: 0.1\nlog: {level: warn}\nstorage:\n  filesystem: {rootdirectory: " + filepath.Join(dir, "data") +
		"}\n  delete: {enabled: true}\nhttp: {addr: \":5000\"}\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		tb.Fatalf("registry: %v", err)
	}
	p := s.process("registry", s.HostNet, filepath.Join(Deps(tb), "bin", "docker-registry"), "serve", config)
	p.Start(tb)
	tb.Cleanup(func() { p.Stop(tb) })
	client := &http.Client{Transport: &http.Transport{DialContext: s.HostNet.Dial, DisableKeepAlives: true}}
	Eventually(tb, "the registry answers", func() bool {
		req, err := http.NewRequestWithContext(tb.Context(), http.MethodGet, "http://127.0.0.1:5000/v2/", nil)
		if err != nil {
			tb.Fatalf("registry: %v", err)
		}
		resp, err := client.Do(req)
		if err != nil {
			return false
		}
		return resp.Body.Close() == nil && resp.StatusCode == http.StatusOK
	})
	return p
}

// Engine is a Docker Engine of the test's own, in the clients' namespace.
type Engine struct {
	*Process
	// Host is its address, for DOCKER_HOST.
	Host string
}

// StartEngine starts a Docker Engine and waits until it is ready. It goes with
// the test, which has to remove the containers that it made.
func (s *Site) StartEngine(tb TB) *Engine {
	tb.Helper()
	dir := filepath.Join(s.Dir, "engine")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		tb.Fatalf("engine: %v", err)
	}
	// An empty configuration file keeps out that of the machine's own engine.
	config := filepath.Join(dir, "daemon.json")
	if err := os.WriteFile(config, []byte("{}\n"), 0o600); err != nil {
		tb.Fatalf("engine: %v", err)
	}
	socket := "unix://" + filepath.Join(dir, "docker.sock")
	bin := filepath.Join(Deps(tb), "bin")
	p := s.process("engine", s.ClientNet, filepath.Join(bin, "dockerd"),
		"--config-file", config, "--host", socket,
		"--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"), "--pidfile", filepath.Join(dir, "pid"),
		// The namespace has no way out that the engine's firewall could help.
		"--bridge", "none", "--iptables=false", "--ip6tables=false")
	for _, kv := range Environ() {
		if path, ok := strings.CutPrefix(kv, "PATH="); ok {
			kv = "PATH=" + bin + ":" + path
		}
		p.Env = append(p.Env, kv)
	}
	p.Start(tb)
	tb.Cleanup(func() { p.Stop(tb) })
	p.WaitLog(tb, "API listen on")
	return &Engine{Process: p, Host: socket}
}
