package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opendepot/depot/e2e/site"
)

// TestHostUp looks after one host with `docker depot`, from nothing to nothing
// again: up, configure, doctor, down. Each part goes on where the one before
// left it.
func TestHostUp(t *testing.T) {
	t.Parallel()
	h := newUpHost(t)
	_ = t.Run("before up", h.testBeforeUp) &&
		t.Run("as another user", h.testUpAsAnotherUser) &&
		t.Run("up", h.testUp) &&
		t.Run("login", h.testLoginOnHost) &&
		t.Run("nouns", h.testNouns) &&
		t.Run("configure", h.testConfigure) &&
		t.Run("doctor", h.testDoctor) &&
		t.Run("killed daemons", h.testKilledDaemons) &&
		t.Run("down keeps caches", h.testDownKeepsCaches) &&
		t.Run("purge", h.testPurge)
}

func (h *upHost) testBeforeUp(t *testing.T) {
	h.refused(t, append([]string{"depot", "up", "--status"}, h.dirs...), "Control plane: not running", "run `docker depot up`")
	h.refused(t, []string{"depot", "doctor"}, "finds no such plugin", "no depot server is known", "docker depot up")
	h.refused(t, []string{"depot", "whoami"}, "docker depot login")
	h.refused(t, []string{"depot", "configure"}, "docker depot login")
	h.says(t, h.down(), "nothing to stop")
	for _, dir := range []string{h.data, h.run} {
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("asking made %s", dir)
		}
	}
}

// testUpAsAnotherUser asks for up and down without root: the one command to
// give is the answer, and nothing is changed.
func (h *upHost) testUpAsAnotherUser(t *testing.T) {
	depot := filepath.Join(site.Bin(t), "docker-depot")
	for _, args := range [][]string{h.up, h.down("--purge")} {
		// It may read what only root may, so that the program can be where it is.
		r := h.Try(t, append([]string{
			"setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups",
			"--inh-caps", "-all,+dac_read_search", "--ambient-caps", "-all,+dac_read_search", "--", depot,
		}, args[1:]...)...)
		if want := "run `sudo " + depot + " " + args[1]; r.Code != 1 || !strings.Contains(r.Err, want) || !strings.Contains(r.Err, h.data) {
			t.Errorf("%s: exit code %d, want 1 and %q:\n%s", args[1], r.Code, want, r.All())
		}
	}
	if _, err := os.Stat(h.data); err == nil {
		t.Error("another user's up made the data directory")
	}
}

func (h *upHost) testUp(t *testing.T) {
	h.says(t, h.up, "depot is up: https://127.0.0.1:8443", "docker depot configure --project default/main")
	controlPlane, agent := h.pid(t, "controlplane"), h.pid(t, "agent")
	if uid := owner(t, controlPlane); uid != 65534 {
		t.Errorf("the control plane runs as user %d, want nobody (65534)", uid)
	}
	if uid := owner(t, agent); uid != 0 {
		t.Errorf("the agent runs as user %d, want root", uid)
	}
	h.says(t, h.up, "control plane runs already", "agent runs already")
	if c, a := h.pid(t, "controlplane"), h.pid(t, "agent"); c != controlPlane || a != agent {
		t.Errorf("a second up replaced processes %d and %d by %d and %d", controlPlane, agent, c, a)
	}
	h.says(t, append([]string{"depot", "up", "--status"}, h.dirs...), "Control plane: ready", "Agent:         ready")
	projects := strings.Fields(h.CLI(t, "depot", "project", "ls", "--format", "{{.Name}}").Out)
	if diff := cmp.Diff([]string{"default/main"}, projects); diff != "" {
		t.Errorf("projects after two ups (-want +got):\n%s", diff)
	}
}

// testLoginOnHost logs in as another user of the host would, and out.
func (h *upHost) testLoginOnHost(t *testing.T) {
	h.says(t, []string{"depot", "whoami"}, `user "first administrator", admin of the whole server`)
	other := h.s.NewBareHome(t)
	token := strings.TrimSpace(read(t, filepath.Join(h.data, "controlplane", "admin-token")))
	depot := []string{filepath.Join(site.Deps(t), "bin", "docker"), "depot"}
	login := other.Command(t.Context(), append(depot, "login", "--token-stdin", "https://127.0.0.1:8443")...)
	login.Stdin = strings.NewReader(token)
	if out, err := login.CombinedOutput(); err != nil || strings.Contains(string(out), token) {
		t.Errorf("login: %v:\n%s", err, out)
	}
	kept := filepath.Join(other.Docker(), "depot", "logins.json")
	if info, err := os.Stat(kept); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the login is kept with mode %v (%v), want 0600", info, err)
	}
	if who := other.CLI(t, "depot", "whoami", "--format", "{{.Role}} {{.Server}}").Out; who != "admin https://127.0.0.1:8443\n" {
		t.Errorf("whoami: %q", who)
	}
	other.CLI(t, "depot", "logout")
	if r := other.TryCLI(t, "depot", "whoami"); r.Code != 1 {
		t.Errorf("whoami after logout: exit code %d:\n%s", r.Code, r.All())
	}
	if text := read(t, kept); strings.Contains(text, token) {
		t.Errorf("logout left the token in %s", kept)
	}
}

// testNouns lists, makes, shows, changes and removes each noun in each format
// once, and asks for completions as a shell does.
func (h *upHost) testNouns(t *testing.T) {
	one := func(args ...string) string {
		return strings.TrimSpace(h.CLI(t, append([]string{"depot"}, args...)...).Out)
	}
	if got := one("project", "create", "web", "--idle-timeout", "3m"); got != "default/web" {
		t.Errorf("project create printed %q", got)
	}
	one("project", "update", "default/web", "--cache-size", "5GiB")
	if got := one("project", "inspect", "web", "--format", "{{.IdleTimeout}} {{.CacheBytes}}"); got != "3m 5368709120" {
		t.Errorf("the project's settings are %q", got)
	}
	token := one("token", "create", "--project", "web", "--expires", "1h", "ci")
	if !strings.HasPrefix(token, "depot_project_") || strings.ContainsAny(token, " \n") {
		t.Errorf("token create printed %q", token)
	}
	if got := one("token", "ls", "--project", "web", "--format", "{{.Name}} {{.Kind}}"); got != "ci project" {
		t.Errorf("the project's tokens are %q", got)
	}
	r := h.With("DEPOT_TOKEN="+token).CLI(t, "depot", "whoami", "--format", "{{.Project}} {{.TokenFrom}}")
	if r.Out != "web DEPOT_TOKEN\n" {
		t.Errorf("whoami with the project's token: %q", r.Out)
	}
	one("token", "rm", "--force", one("token", "ls", "--project", "web", "--quiet"))
	if r := h.With("DEPOT_TOKEN="+token).TryCLI(t, "depot", "whoami"); r.Code != 1 {
		t.Errorf("a token that was removed still serves: %s", r.All())
	}
	for noun, head := range map[string]string{
		"project": "PROJECT ID", "token": "TOKEN ID", "machine": "MACHINE ID", "pool": "POOL", "agent": "AGENT ID",
	} {
		if table := one(noun, "ls"); !strings.Contains(table, head) {
			t.Errorf("%s ls has no column %q:\n%s", noun, head, table)
		}
		for line := range strings.Lines(one(noun, "ls", "--format", "json")) {
			if !json.Valid([]byte(line)) {
				t.Errorf("%s ls --format json has a line that is none: %q", noun, line)
			}
		}
		if r := h.TryCLI(t, "depot", noun, "ls", "--format", "{{.NoSuchColumn}}"); noun != "machine" && r.Code == 0 {
			t.Errorf("%s ls took a template that names no column:\n%s", noun, r.All())
		}
	}
	for line, want := range map[string]string{
		"project inspect ":         "default/web",
		"project rm ":              "default/web",
		"configure --project ":     "default/web",
		"pool ls --format ":        "json",
		"up --emulate ":            "arm64",
		"agent rm ":                "agt_",
		"token create --role ":     "viewer",
		"token create --project d": "default/main",
		"mach":                     "machine",
	} {
		words := strings.Split("depot "+line, " ")
		if got := h.CLI(t, append([]string{"__complete"}, words...)...).Out; !strings.Contains(got, want) {
			t.Errorf("completions of `docker depot %s` lack %q:\n%s", line, want, got)
		}
	}
	one("project", "rm", "--force", "web")
	if got := one("project", "ls", "--format", "{{.Name}}"); got != "default/main" {
		t.Errorf("projects after one was removed: %q", got)
	}
}

// tinyDockerfile has one step.
const tinyDockerfile = "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\",\"touch\",\"/here\"]\n"

// testConfigure configures, builds with plain `docker build`, and takes the
// configuration back: what the user had is there again, byte for byte. Then it
// configures again, for the parts that follow.
func (h *upHost) testConfigure(t *testing.T) {
	config := filepath.Join(h.Docker(), "config.json")
	if err := os.WriteFile(config, []byte("{ \"auths\":{},\n      \"HttpHeaders\" : {\"X\":\"y\"} }"), 0o640); err != nil { //nolint:gosec // a mode that has to come back
		t.Fatal(err)
	}
	// The first look at buildx's store makes it; that is not configure's doing.
	h.TryCLI(t, "depot", "doctor", "--launch=false")
	before := fingerprint(t, h.Docker())
	dir := site.Context(t, map[string]string{"Dockerfile": tinyDockerfile})
	for _, flags := range [][]string{nil, {"--default-load"}} {
		h.CLI(t, append([]string{"depot", "configure", "--project", "main"}, flags...)...)
		h.CLI(t, append([]string{"depot", "configure"}, flags...)...)
		if flags == nil {
			if r := h.CLI(t, "build", "--progress", "plain", dir); !strings.Contains(r.All(), "using depot driver") {
				t.Errorf("docker build after configure:\n%s", r.All())
			}
		}
		h.CLI(t, "depot", "configure", "--uninstall")
		if diff := cmp.Diff(before, fingerprint(t, h.Docker())); diff != "" {
			t.Errorf("uninstall did not put back what was there (-before +after):\n%s", diff)
		}
	}
	h.says(t, []string{"depot", "configure", "--uninstall"}, "nothing to undo")
	h.CLI(t, "depot", "configure")
}

// testDoctor breaks each link in turn: doctor names it, says how to mend it,
// and ends with 1. Whole, it ends with 0.
func (h *upHost) testDoctor(t *testing.T) {
	doctor := []string{"depot", "doctor"}
	h.says(t, doctor, "buildkitd v", "answered after")
	var checks []struct{ Link, Result string }
	if err := json.Unmarshal([]byte(h.CLI(t, "depot", "doctor", "--format", "json").Out), &checks); err != nil || len(checks) < 8 {
		t.Errorf("doctor --format json: %v: %v", err, checks)
	}
	plugin, config := filepath.Join(h.Docker(), "cli-plugins", "docker-buildx"), filepath.Join(h.Docker(), "config.json")
	token := strings.TrimSpace(read(t, filepath.Join(h.data, "controlplane", "admin-token")))
	kind, rest, _ := strings.Cut(strings.TrimPrefix(token, "depot_"), "_")
	id, secret, _ := strings.Cut(rest, "_")
	wrong := "depot_" + kind + "_" + id + "_" + strings.Map(func(rune) rune { return 'a' }, secret[:10]) + secret[10:]
	for name, broken := range map[string]struct {
		env   []string
		apart string // a file that is taken away meanwhile
		says  []string
	}{
		"plugin file missing": {nil, plugin, []string{"fail  docker-buildx", "run `docker depot configure`"}},
		"alias missing":       {nil, config, []string{"fail  alias", "run `docker depot configure`"}},
		"builder elsewhere":   {[]string{"BUILDX_BUILDER=default"}, "", []string{"fail  builder", "unset BUILDX_BUILDER"}},
		"builder unknown":     {[]string{"BUILDX_BUILDER=nosuch"}, "", []string{"fail  builder", "unset BUILDX_BUILDER"}},
		"token malformed":     {[]string{"DEPOT_TOKEN=rubbish"}, "", []string{"fail  login", "DEPOT_TOKEN"}},
		"token wrong":         {[]string{"DEPOT_TOKEN=" + wrong}, "", []string{"fail  server", "docker depot login https://127.0.0.1:8443"}},
	} {
		if broken.apart != "" {
			if err := os.Rename(broken.apart, broken.apart+".apart"); err != nil {
				t.Fatal(err)
			}
		}
		r := h.With(broken.env...).TryCLI(t, doctor...)
		if r.Code != 1 {
			t.Errorf("%s: doctor's exit code %d, want 1:\n%s", name, r.Code, r.All())
		}
		for _, text := range broken.says {
			if !strings.Contains(r.All(), text) {
				t.Errorf("%s: doctor does not say %q:\n%s", name, text, r.All())
			}
		}
		if broken.apart != "" {
			if err := os.Rename(broken.apart+".apart", broken.apart); err != nil {
				t.Fatal(err)
			}
		}
	}
	h.CLI(t, doctor...)
}

// testKilledDaemons kills the agent, then the control plane: doctor and
// --status name them, and up brings them back with the machine that ran.
func (h *upHost) testKilledDaemons(t *testing.T) {
	machines := []string{"depot", "machine", "ls", "--quiet"}
	machine := h.CLI(t, machines...).Out
	h.kill(t, "agent")
	h.refused(t, append([]string{"depot", "up", "--status"}, h.dirs...), "Agent:         not running", "run `docker depot up`")
	site.Eventually(t, "the control plane misses the agent", func() bool {
		return strings.TrimSpace(h.CLI(t, "depot", "agent", "ls", "--format", "{{.Connected}}").Out) == "no"
	})
	h.refused(t, []string{"depot", "doctor", "--timeout", "5s"}, "fail  pool", "its agent is not connected", "docker depot up")
	h.kill(t, "controlplane")
	h.refused(t, []string{"depot", "doctor"}, "fail  server", "cannot be reached", "docker depot up")
	h.CLI(t, h.up...)
	h.CLI(t, "depot", "doctor")
	if got := h.CLI(t, machines...).Out; got != machine || got == "" {
		t.Errorf("machines %q after the daemons were killed, before %q", got, machine)
	}
}

func (h *upHost) testDownKeepsCaches(t *testing.T) {
	dir := site.Context(t, map[string]string{"Dockerfile": tinyDockerfile})
	h.CLI(t, "build", dir)
	pids := []int{h.pid(t, "controlplane"), h.pid(t, "agent")}
	h.says(t, h.down(), "depot is down; caches and settings are kept in "+h.data)
	for _, pid := range pids {
		// One that has ended and that nobody has waited for has no arguments.
		if line, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline")); err == nil && len(line) > 0 {
			t.Errorf("process %d outlived down: %q", pid, line)
		}
	}
	h.says(t, h.down(), "nothing to stop")
	h.CLI(t, h.up...)
	if r := h.CLI(t, "build", "--progress", "plain", dir); strings.Count(r.All(), "CACHED") != 2 {
		t.Errorf("the build after down and up is not cached:\n%s", r.All())
	}
}

// testPurge removes everything; without --force and a terminal to ask on,
// nothing.
func (h *upHost) testPurge(t *testing.T) {
	h.refused(t, h.down("--purge"), "--force")
	if h.pid(t, "agent") == 0 {
		t.Error("a purge that was refused ended the agent")
	}
	h.says(t, h.down("--purge", "--force"), "its data is removed")
	for _, dir := range []string{h.data, h.run} {
		if _, err := os.Lstat(dir); err == nil {
			t.Errorf("%s is still there: %v", dir, fingerprint(t, dir))
		}
	}
	h.refused(t, []string{"depot", "whoami"}, "docker depot login")
}

// upHost is a host that `docker depot up` looks after: a home, and the flags
// that keep it in the test's directories.
type upHost struct {
	*site.Home
	s         *site.Site
	data, run string
	dirs, up  []string
}

// newUpHost makes a host on which nothing runs yet. At the end of the test it
// is taken down, whatever state it is in.
func newUpHost(t *testing.T) *upHost {
	t.Helper()
	s := site.NewBare(t)
	h := &upHost{Home: s.NewBareHome(t), s: s, data: filepath.Join(s.Dir, "data"), run: filepath.Join(s.Dir, "run")}
	h.dirs = []string{"--data-dir", h.data, "--run-dir", h.run}
	h.up = append([]string{"depot", "up", "--user", "nobody", "--agent-arg=--pool-size=4GiB", "--agent-arg=--dns=192.0.2.53"}, h.dirs...)
	t.Cleanup(func() {
		args := append([]string{filepath.Join(site.Bin(t), "docker-depot")}, h.down("--purge", "--force")[1:]...)
		if out, err := h.Command(context.Background(), args...).CombinedOutput(); err != nil {
			t.Errorf("take the host down: %v: %s", err, out)
		}
	})
	return h
}

// down is `docker depot down` with further flags.
func (h *upHost) down(flags ...string) []string {
	return append(append([]string{"depot", "down"}, h.dirs...), flags...)
}

// pid reads the process that a pid file names, 0 if there is none.
func (h *upHost) pid(t *testing.T, name string) int {
	t.Helper()
	var r struct{ PID int }
	text, err := os.ReadFile(filepath.Join(h.run, name+".pid"))
	if err != nil {
		return 0
	}
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	return r.PID
}

// kill ends a daemon without a chance to clean up.
func (h *upHost) kill(t *testing.T, name string) {
	t.Helper()
	if err := syscall.Kill(h.pid(t, name), syscall.SIGKILL); err != nil {
		t.Fatalf("kill the %s: %v", name, err)
	}
}

// refused runs a command that has to end with exit code 1 and with each text
// in what it prints.
func (h *upHost) refused(t *testing.T, args []string, texts ...string) {
	t.Helper()
	r := h.TryCLI(t, args...)
	if r.Code != 1 {
		t.Errorf("docker %s: exit code %d, want 1:\n%s", strings.Join(args, " "), r.Code, r.All())
	}
	for _, text := range texts {
		if !strings.Contains(r.All(), text) {
			t.Errorf("docker %s does not say %q:\n%s", strings.Join(args, " "), text, r.All())
		}
	}
}

// says runs a command that has to succeed and to print each text.
func (h *upHost) says(t *testing.T, args []string, texts ...string) {
	t.Helper()
	r := h.CLI(t, args...)
	for _, text := range texts {
		if !strings.Contains(r.All(), text) {
			t.Errorf("docker %s does not say %q:\n%s", strings.Join(args, " "), text, r.All())
		}
	}
}

// fingerprint maps every path below dir to its kind, mode and content.
func fingerprint(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		content := ""
		switch {
		case info.Mode().IsRegular():
			text, err := os.ReadFile(path) //nolint:gosec // a path below the test's own directory
			if err != nil {
				return err
			}
			sum := sha256.Sum256(text)
			content = hex.EncodeToString(sum[:])
		case info.Mode()&fs.ModeSymlink != 0:
			if content, err = os.Readlink(path); err != nil {
				return err
			}
		}
		found[path] = info.Mode().String() + " " + content
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// owner is the user that a process runs as.
func owner(t *testing.T, pid int) uint32 {
	t.Helper()
	info, err := os.Stat(filepath.Join("/proc", strconv.Itoa(pid)))
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Uid //nolint:errcheck,forcetypeassert // as everywhere on Linux
}
