package configure

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/docker/cli/cli/command"
	cliflags "github.com/docker/cli/cli/flags"
	"github.com/google/go-cmp/cmp"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/api/depot/v1/depotv1connect"
	"github.com/opendepot/depot/driver"
	"github.com/opendepot/depot/driver/credentials"
	"github.com/opendepot/depot/plugin/servertest"
)

func containsText(s, part string) bool { return strings.Contains(s, part) }

// builderService answers what making a builder asks.
type builderService struct {
	depotv1connect.UnimplementedBuilderServiceHandler
	archs []string
}

func (b *builderService) GetBuilder(context.Context, *depotv1.GetBuilderRequest) (*depotv1.GetBuilderResponse, error) {
	resp := &depotv1.GetBuilderResponse{ProjectId: "prj_1", Project: "default/main"}
	for _, arch := range b.archs {
		resp.Architectures = append(resp.Architectures, &depotv1.Architecture{Name: arch})
	}
	return resp, nil
}

// host is a user's docker CLI with a program to install.
type host struct {
	t       *testing.T
	dir     string // the CLI's configuration directory
	cli     command.Cli
	options Options
	service *builderService
}

// newHost sets up a server, registers the driver for it, and makes a CLI whose
// configuration directory holds files. It changes the process's environment,
// and so its tests run one after the other.
func newHost(t *testing.T, files map[string]string) *host {
	t.Helper()
	service := &builderService{archs: []string{"amd64"}}
	_, handler := depotv1connect.NewBuilderServiceHandler(service)
	url, token := servertest.Start(t, handler)
	env := map[string]string{credentials.EnvURL: url, credentials.EnvToken: token}
	logins := t.TempDir()
	driver.Register(driver.Options{
		Credentials: credentials.Source{Env: func(k string) string { return env[k] }, Dir: "/", Store: credentials.Store{Dir: func() string { return logins }, NoKeyring: true}},
		Stderr:      os.Stderr,
	})

	dir := filepath.Join(t.TempDir(), "docker")
	for name, content := range files {
		writeTestFile(t, filepath.Join(dir, name), content)
	}
	t.Setenv("DOCKER_CONFIG", dir)
	t.Setenv("BUILDX_CONFIG", "")
	program := filepath.Join(t.TempDir(), "program")
	writeTestFile(t, program, "program 1")
	h := &host{t: t, dir: dir, service: service, options: Options{
		Executable: program, Builder: "depot", Endpoint: "depot://" + strings.TrimPrefix(url, "https://") + "/default/main",
	}}
	h.reload()
	return h
}

// reload reads the CLI's configuration as a new process would.
func (h *host) reload() {
	h.t.Helper()
	cli, err := command.NewDockerCli()
	if err != nil {
		h.t.Fatal(err)
	}
	options := cliflags.NewClientOptions()
	options.ConfigDir = h.dir
	if err := cli.Initialize(options); err != nil {
		h.t.Fatal(err)
	}
	cli.ConfigFile().Filename = filepath.Join(h.dir, "config.json")
	h.cli = cli
}

func (h *host) install() Report {
	h.t.Helper()
	report, err := Install(h.t.Context(), h.cli, h.options)
	if err != nil {
		h.t.Fatalf("Install: %v", err)
	}
	h.reload()
	return report
}

func (h *host) uninstall() Report {
	h.t.Helper()
	report, err := Uninstall(h.t.Context(), h.cli)
	if err != nil {
		h.t.Fatalf("Uninstall: %v", err)
	}
	h.reload()
	return report
}

// tree is all that there is below the configuration directory: modes, link
// targets and contents.
func (h *host) tree() map[string]string {
	h.t.Helper()
	tree := map[string]string{}
	err := filepath.WalkDir(h.dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(h.dir, path)
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		content := ""
		switch {
		case info.Mode().IsRegular():
			text, err := os.ReadFile(path) //nolint:gosec // a test reads its own directory
			if err != nil {
				return err
			}
			sum := sha256.Sum256(text)
			content = hex.EncodeToString(sum[:8])
		case info.Mode()&fs.ModeSymlink != 0:
			content, err = os.Readlink(path)
		}
		tree[name] = info.Mode().String() + " " + content
		return err
	})
	if err != nil && !os.IsNotExist(err) {
		h.t.Fatal(err)
	}
	return tree
}

func (h *host) path(name string) string { return filepath.Join(h.dir, name) }

func (h *host) read(name string) string {
	h.t.Helper()
	text, err := os.ReadFile(h.path(name))
	if err != nil {
		h.t.Fatal(err)
	}
	return string(text)
}

func writeTestFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // as users have it
		t.Fatal(err)
	}
	mode := fs.FileMode(0o644)
	if strings.Contains(path, "docker-") {
		mode = 0o755
	}
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
}

// existing is a docker configuration that has been in use for a while.
func existing() map[string]string {
	return map[string]string{
		"config.json":                "{\n  \"auths\": {\"r.example\": {\"auth\": \"eDp5\"}},\n  \"someKey\":   {\"b\":1, \"a\":2},\n  \"currentContext\": \"default\"\n}",
		"cli-plugins/docker-buildx":  "#!/bin/sh\necho the user's own\n",
		"cli-plugins/docker-compose": "compose",
		"buildx/current":             `{"Key":"unix:///var/run/docker.sock","Name":"mine","Global":false}`,
		"buildx/instances/mine":      `{"Name":"mine","Driver":"docker-container","Nodes":[{"Name":"mine0","Endpoint":"unix:///var/run/docker.sock","Platforms":null,"DriverOpts":null,"Flags":null,"Files":null}],"Dynamic":false}`,
		"buildx/activity/mine":       "2026-01-01T00:00:00Z",
		"buildx/defaults/x":          "mine",
		"buildx/refs/x":              "",
		"buildx/.buildNodeID":        "0123456789abcdef",
		"buildx/.lock":               "",
	}
}

func TestUninstallRestoresByteForByte(t *testing.T) {
	tests := map[string]struct {
		files map[string]string
		times int
	}{
		"nothing there":                 {nil, 1},
		"nothing there, twice":          {nil, 2},
		"in use":                        {existing(), 1},
		"in use, three times":           {existing(), 3},
		"empty config":                  {map[string]string{"config.json": ""}, 2},
		"alias of the user's":           {map[string]string{"config.json": `{"aliases":{"builder":"other"}}`}, 2},
		"alias is buildx already":       {map[string]string{"config.json": `{"aliases":{"builder":"buildx"}}`}, 2},
		"plugins without configuration": {map[string]string{"cli-plugins/docker-depot": "older"}, 1},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, test.files)
			before := h.tree()
			for range test.times {
				h.install()
			}
			if got, want := h.read("cli-plugins/docker-buildx"), "program 1"; got != want {
				t.Errorf("docker-buildx holds %q, want %q", got, want)
			}
			var config struct{ Aliases map[string]string }
			if err := json.Unmarshal([]byte(h.read("config.json")), &config); err != nil || config.Aliases["builder"] != "buildx" {
				t.Errorf("aliases = %v, %v, want builder to be buildx", config.Aliases, err)
			}
			if current, err := currentName(h.path("buildx/current")); err != nil || current != "depot" {
				t.Errorf("current builder = %q, %v, want depot", current, err)
			}
			h.uninstall()
			if diff := cmp.Diff(before, h.tree()); diff != "" {
				t.Errorf("tree after uninstall (-before +after):\n%s", diff)
			}
			if _, err := Uninstall(t.Context(), h.cli); err != ErrNotInstalled { //nolint:errorlint // it is returned as it is
				t.Errorf("second Uninstall = %v, want ErrNotInstalled", err)
			}
			if diff := cmp.Diff(before, h.tree()); diff != "" {
				t.Errorf("tree after the second uninstall (-before +after):\n%s", diff)
			}
		})
	}
}

func TestUninstallKeepsWhatTheUserChanged(t *testing.T) {
	h := newHost(t, existing())
	h.install()
	writeTestFile(t, h.path("cli-plugins/docker-buildx"), "a newer one of the user's")
	config := strings.Replace(h.read("config.json"), `"currentContext": "default"`, `"currentContext": "other"`, 1)
	writeTestFile(t, h.path("config.json"), config)
	writeTestFile(t, h.path("buildx/current"), `{"Key":"","Name":"mine","Global":true}`)

	report := h.uninstall()

	if got, want := h.read("cli-plugins/docker-buildx"), "a newer one of the user's"; got != want {
		t.Errorf("docker-buildx holds %q, want %q", got, want)
	}
	want := strings.Replace(existing()["config.json"], `"currentContext": "default"`, `"currentContext": "other"`, 1)
	if diff := cmp.Diff(want, h.read("config.json")); diff != "" {
		t.Errorf("config.json (-want +got):\n%s", diff)
	}
	if current, err := currentName(h.path("buildx/current")); err != nil || current != "mine" {
		t.Errorf("current builder = %q, %v, want mine", current, err)
	}
	if _, err := os.Stat(h.path("cli-plugins/docker-depot")); !os.IsNotExist(err) {
		t.Errorf("docker-depot is still there: %v", err)
	}
	if len(report.Notes) != 3 {
		t.Errorf("notes = %q, want one each for the plugin, config.json and the current builder", report.Notes)
	}
}

func TestInstallAgainKeepsTheUsersChanges(t *testing.T) {
	h := newHost(t, existing())
	h.install()
	config := strings.Replace(h.read("config.json"), `"b":1`, `"b":2`, 1)
	writeTestFile(t, h.path("config.json"), config)
	h.install()
	h.uninstall()
	want := strings.Replace(existing()["config.json"], `"b":1`, `"b":2`, 1)
	if diff := cmp.Diff(want, h.read("config.json")); diff != "" {
		t.Errorf("config.json (-want +got):\n%s", diff)
	}
}

func TestInstallAgainRefreshesNodesAndProgram(t *testing.T) {
	h := newHost(t, nil)
	h.install()
	before := h.read("buildx/instances/depot")
	h.service.archs = []string{"amd64", "arm64"}
	writeTestFile(t, h.options.Executable, "program 2")
	h.install()
	after := h.read("buildx/instances/depot")
	if strings.Contains(before, "arm64-main") || !strings.Contains(after, "arm64-main") {
		t.Errorf("nodes before %s and after %s: want arm64 only after", before, after)
	}
	if got := h.read("cli-plugins/docker-depot"); got != "program 2" {
		t.Errorf("docker-depot holds %q, want the new program", got)
	}
	h.uninstall()
	if tree := h.tree(); len(tree) != 0 {
		t.Errorf("left behind: %v", tree)
	}
}

func TestInstallRefusalsChangeNothing(t *testing.T) {
	tests := map[string]struct {
		files  map[string]string
		change func(*host)
		want   string
	}{
		"malformed config": {map[string]string{"config.json": "{\n\t\"auths\": {,\n}"}, func(*host) {}, "line 2, column 12"},
		"foreign builder":  {existing(), func(h *host) { h.options.Builder = "mine" }, "choose another name"},
		"bad name":         {nil, func(h *host) { h.options.Builder = "0/x" }, "is not valid"},
		"no pool":          {existing(), func(h *host) { h.service.archs = nil }, "no pool"},
		"no program":       {nil, func(h *host) { h.options.Executable += "x" }, "own file"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, nil)
			for name, content := range test.files {
				writeTestFile(t, h.path(name), content)
			}
			test.change(h)
			before := h.tree()
			_, err := Install(t.Context(), h.cli, h.options)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Install = %v, want %q in it", err, test.want)
			}
			if diff := cmp.Diff(before, h.tree()); diff != "" {
				t.Errorf("tree (-before +after):\n%s", diff)
			}
		})
	}
}

// A crash leaves what was done until then; at each point, uninstalling puts
// everything back, and installing again finishes.
func TestCrash(t *testing.T) {
	steps := map[string]func(*host, *session, configChange, []string){
		"intent": func(*host, *session, configChange, []string) {},
		"builder": func(h *host, s *session, _ configChange, _ []string) {
			h.must(s.makeBuilder(h.t.Context(), h.options, ""))
		},
		"plugins": func(h *host, s *session, _ configChange, plugins []string) {
			h.must(s.makeBuilder(h.t.Context(), h.options, ""))
			h.must(s.copyProgram(h.options.Executable, plugins[0]))
		},
		"config": func(h *host, s *session, c configChange, plugins []string) {
			h.must(s.makeBuilder(h.t.Context(), h.options, ""))
			for _, path := range plugins {
				h.must(s.copyProgram(h.options.Executable, path))
			}
			h.must(s.writeConfig(c))
		},
	}
	for name, crashAfter := range steps {
		for _, again := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/install again %t", name, again), func(t *testing.T) {
				h := newHost(t, existing())
				before := h.tree()
				h.crash(crashAfter)
				if again {
					h.install()
				}
				h.uninstall()
				if diff := cmp.Diff(before, h.tree()); diff != "" {
					t.Errorf("tree (-before +after):\n%s", diff)
				}
			})
		}
	}
}

// crash installs up to a point.
func (h *host) crash(after func(*host, *session, configChange, []string)) {
	h.t.Helper()
	s, done, err := open(h.cli)
	h.must(err)
	defer done()
	config, err := s.planConfig()
	h.must(err)
	plugins, err := s.planPlugins(h.options.Executable)
	h.must(err)
	h.must(s.noteAll(h.options, "", config, plugins))
	after(h, s, config, plugins)
}

func (h *host) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func TestExtraDirsAndLinksAreRestored(t *testing.T) {
	extra := t.TempDir()
	writeTestFile(t, filepath.Join(extra, "docker-buildx"), "#!/bin/sh\nexit 1\n")
	h := newHost(t, map[string]string{"real.json": fmt.Sprintf(`{"cliPluginsExtraDirs":[%q]}`, extra)})
	h.must(os.Symlink("real.json", h.path("config.json")))
	h.must(os.MkdirAll(h.path("cli-plugins"), 0o755)) //nolint:gosec // as users have it
	h.must(os.Symlink("/usr/bin/elsewhere", h.path("cli-plugins/docker-buildx")))
	h.reload()
	before := h.tree()
	report := h.install()
	if len(report.Notes) != 1 {
		t.Errorf("notes = %q, want one about the extra directory", report.Notes)
	}
	if dirs := extraDirs(jsonText(h.read("config.json"))); len(dirs) != 2 || dirs[0] != h.path("cli-plugins") {
		t.Errorf("extra directories = %q, want the user's own first", dirs)
	}
	h.install()
	h.uninstall()
	if diff := cmp.Diff(before, h.tree()); diff != "" {
		t.Errorf("tree (-before +after):\n%s", diff)
	}
}

// The real docker CLI takes the plugin that was installed, also where an extra
// directory has another one.
func TestDockerRunsTheInstalledPlugin(t *testing.T) {
	docker, err := exec.LookPath("docker")
	if err != nil {
		t.Fatalf("this test needs the docker CLI: %v", err)
	}
	extra := t.TempDir()
	plugin := func(version string) string {
		return "#!/bin/sh\n" +
			`[ "$1" = docker-cli-plugin-metadata ] && { echo '{"SchemaVersion":"0.1.0","Vendor":"v","Version":"` + version + `"}'; exit; }` +
			"\necho \"" + version + " $*\"\n"
	}
	writeTestFile(t, filepath.Join(extra, "docker-buildx"), plugin("theirs"))
	h := newHost(t, map[string]string{"config.json": fmt.Sprintf(`{"cliPluginsExtraDirs":[%q]}`, extra)})
	writeTestFile(t, h.options.Executable, plugin("ours"))
	build := func() string {
		cmd := exec.CommandContext(t.Context(), docker, "buildx", "ls")
		cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+h.dir)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("docker buildx ls: %v\n%s", err, out)
		}
		return string(out)
	}
	if got := build(); !strings.HasPrefix(got, "theirs") {
		t.Errorf("before: docker ran %q, want theirs", got)
	}
	h.install()
	if got := build(); !strings.HasPrefix(got, "ours") {
		t.Errorf("configured: docker ran %q, want ours", got)
	}
	h.uninstall()
	if got := build(); !strings.HasPrefix(got, "theirs") {
		t.Errorf("after: docker ran %q, want theirs", got)
	}
}
