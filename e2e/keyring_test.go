package e2e

import (
	"bufio"
	"context"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opendepot/depot/e2e/site"
)

// keyring runs a secret service on a private bus, unlocked, and returns the
// environment by which the programs of home find it.
func keyring(t *testing.T, home *site.Home) []string {
	t.Helper()
	var env []string
	for _, name := range []string{"XDG_RUNTIME_DIR", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"} {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o700); err != nil { //nolint:gosec // a directory
			t.Fatal(err)
		}
		env = append(env, name+"="+dir)
	}
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), "dbus-run-session", "--", "sh", "-c",
		`echo "$DBUS_SESSION_BUS_ADDRESS"; printf password | exec gnome-keyring-daemon --foreground --unlock --components=secrets`)
	cmd.Env = append(append(site.Environ(), "HOME="+home.Dir), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("Debian's dbus-daemon and gnome-keyring are needed: %v", err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
		_ = cmd.Wait()
	})
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	env = append(env, "DBUS_SESSION_BUS_ADDRESS="+strings.TrimSpace(address))
	// Asking the service itself would have the bus start another one, locked.
	site.Eventually(t, "the secret service is on the bus", func() bool {
		return strings.Contains(bus(t, env, "org.freedesktop.DBus", "/org/freedesktop/DBus",
			"org.freedesktop.DBus.NameHasOwner", "string:org.freedesktop.secrets"), "boolean true")
	})
	site.Eventually(t, "the keyring is unlocked", func() bool { return strings.Contains(collection(t, env, "Locked"), "boolean false") })
	return env
}

// bus calls a method over the bus of an environment, and returns what it
// answers; nothing if that is an error.
func bus(t *testing.T, env []string, destination string, call ...string) string {
	t.Helper()
	args := append([]string{"--session", "--print-reply", "--dest=" + destination}, call...)
	cmd := exec.CommandContext(t.Context(), "dbus-send", args...) //nolint:gosec // the test's own arguments
	cmd.Env = append(site.Environ(), env...)
	out, err := cmd.Output()
	if err != nil {
		return ""
	}
	return string(out)
}

// collection returns a property of the keyring.
func collection(t *testing.T, env []string, property string) string {
	t.Helper()
	return bus(t, env, "org.freedesktop.secrets", "/org/freedesktop/secrets/collection/login",
		"org.freedesktop.DBus.Properties.Get", "string:org.freedesktop.Secret.Collection", "string:"+property)
}

// login logs in with a token on standard input.
func login(t *testing.T, home *site.Home, server, token string) string {
	t.Helper()
	cmd := home.Command(t.Context(), filepath.Join(site.Deps(t), "bin", "docker"), "depot", "login", "--token-stdin", server)
	cmd.Stdin = strings.NewReader(token + "\n")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("login: %v: %s", err, out)
	}
	return string(out)
}

// holding lists the files of a home that hold text, with their modes.
func holding(t *testing.T, home *site.Home, text string) map[string]fs.FileMode {
	t.Helper()
	found := map[string]fs.FileMode{}
	err := filepath.WalkDir(home.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || !strings.Contains(read(t, path), text) {
			return err
		}
		info, err := d.Info()
		if err == nil {
			found[path] = info.Mode()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// TestKeyring logs in where there is a keyring and where there is none, builds
// with what was stored, and logs out.
func TestKeyring(t *testing.T) {
	t.Parallel()
	s := site.New(t, site.Config{})
	s.AddHost(t, site.HostConfig{})
	s.CreateProject(t, "web", nil)
	token := s.ProjectToken(t, "web")
	dir := site.Context(t, map[string]string{"Dockerfile": base})
	for name, tt := range map[string]struct {
		keyring bool
		kept    string
	}{
		"keyring": {keyring: true, kept: "kept in the keyring"},
		"none":    {kept: "kept in a file that only you can read"},
	} {
		t.Run(name, func(t *testing.T) {
			home := s.NewHome(t, "")
			home.Env = nil // neither a token nor a URL
			if tt.keyring {
				home.Env = keyring(t, home)
			} else {
				home.Env = []string{"DBUS_SESSION_BUS_ADDRESS=unix:path=" + filepath.Join(home.Dir, "no-bus")}
			}
			docker := func(args ...string) site.Result {
				return home.Try(t, append([]string{filepath.Join(site.Deps(t), "bin", "docker")}, args...)...)
			}
			if said := login(t, home, s.URL(), token); !strings.Contains(said, tt.kept) || strings.Contains(said, token) {
				t.Errorf("login says %q", said)
			}
			files := holding(t, home, token)
			if tt.keyring && len(files) > 0 || !tt.keyring && len(files) != 1 {
				t.Errorf("the token is in the files %v", files)
			}
			if tt.keyring && !strings.Contains(collection(t, home.Env, "Items"), "object path") {
				t.Error("after login, the keyring is empty")
			}
			for path, mode := range files {
				if mode.Perm() != 0o600 {
					t.Errorf("%s has the mode %v", path, mode)
				}
			}
			if r := docker("depot", "whoami"); r.Code != 0 || !strings.Contains(r.Out, "default/web") {
				t.Errorf("whoami: exit code %d: %s", r.Code, r.All())
			}
			for _, args := range [][]string{
				{"buildx", "create", "--driver", "depot", "--name", "depot", "--use"},
				{"buildx", "build", dir},
			} {
				if r := docker(args...); r.Code != 0 {
					t.Errorf("%v: exit code %d: %s", args, r.Code, r.All())
				}
			}
			if r := docker("depot", "logout"); r.Code != 0 {
				t.Errorf("logout: exit code %d: %s", r.Code, r.All())
			}
			if files := holding(t, home, token); len(files) > 0 {
				t.Errorf("after logout, the token is in the files %v", files)
			}
			if r := docker("buildx", "build", dir); r.Code != 1 || !strings.Contains(r.Err, "docker depot login") {
				t.Errorf("a build after logout: exit code %d: %s", r.Code, r.All())
			}
			if !tt.keyring {
				return
			}
			if left := collection(t, home.Env, "Items"); !strings.Contains(left, "array") || strings.Contains(left, "object path") {
				t.Errorf("after logout, the keyring has %s", left)
			}
		})
	}
}
