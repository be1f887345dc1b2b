package site

import (
	"os"
	"path/filepath"
)

// NewBare makes a site with nothing in it but a network namespace and a
// directory, for tests of what sets up a system by itself. Any user may pass
// through its directory.
func NewBare(tb TB) *Site {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Fatalf("end-to-end tests need root: they make namespaces and mounts; `make test-unit` runs the rest")
	}
	s := &Site{Dir: tb.TempDir(), tb: tb, bin: Bin(tb)}
	for _, dir := range []string{filepath.Dir(s.Dir), s.Dir} {
		if err := os.Chmod(dir, 0o711); err != nil { //nolint:gosec // passing is all that others may
			tb.Fatalf("open the site's directory: %v", err)
		}
	}
	tb.Cleanup(s.checkLeaks)
	shared := NewNetns(tb)
	s.ControlPlaneNet, s.HostNet, s.ClientNet = shared, shared, shared
	s.ControlPlaneAddress = "127.0.0.1"
	return s
}

// NewBareHome makes a home in which only the plugin docker-depot is installed,
// as the guide says, and whose environment leads nowhere.
func (s *Site) NewBareHome(tb TB) *Home {
	tb.Helper()
	h := &Home{Dir: tb.TempDir(), site: s, Env: []string{"DBUS_SESSION_BUS_ADDRESS=disabled:"}}
	plugins := filepath.Join(h.Docker(), "cli-plugins")
	if err := os.MkdirAll(plugins, 0o700); err != nil {
		tb.Fatalf("home: %v", err)
	}
	if err := os.Symlink(filepath.Join(s.bin, "docker-depot"), filepath.Join(plugins, "docker-depot")); err != nil {
		tb.Fatalf("install docker-depot: %v", err)
	}
	return h
}
