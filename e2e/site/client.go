package site

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/opendepot/depot/controlplane/client"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// NativeArch is the architecture of this machine.
func NativeArch() string { return runtime.GOARCH }

// Admin returns a client of the control plane with the first administrator's
// token, which calls from inside the clients' namespace.
func (s *Site) Admin(tb TB) *client.Client {
	tb.Helper()
	return s.API(tb, s.AdminToken(tb))
}

// API returns a client of the control plane with a token.
func (s *Site) API(tb TB, token string) *client.Client {
	tb.Helper()
	return s.APIAt(tb, s.URL(), token)
}

// APIAt returns a client of the control plane at an address.
func (s *Site) APIAt(tb TB, url, token string) *client.Client {
	tb.Helper()
	parsed, err := client.ParseToken(token)
	if err != nil {
		tb.Fatalf("token: %v", err)
	}
	c, err := client.New(client.Config{URL: url, Token: parsed, UserAgent: "depot-e2e", Dial: s.ClientNet.Dial})
	if err != nil {
		tb.Fatalf("make a client: %v", err)
	}
	return c
}

// CreateProject makes a project of the default organization.
func (s *Site) CreateProject(tb TB, name string, settings *depotv1.ProjectSettings) *depotv1.Project {
	tb.Helper()
	resp, err := s.Admin(tb).Admin.CreateProject(tb.Context(), &depotv1.CreateProjectRequest{Name: name, Settings: settings})
	if err != nil {
		tb.Fatalf("create project %s: %v", name, err)
	}
	return resp.GetProject()
}

// ProjectToken makes a token that may build in the project.
func (s *Site) ProjectToken(tb TB, project string) string {
	tb.Helper()
	resp, err := s.Admin(tb).Admin.CreateToken(tb.Context(), &depotv1.CreateTokenRequest{
		Kind: "project", Name: "e2e", Project: &depotv1.ProjectRef{Name: project},
	})
	if err != nil {
		tb.Fatalf("create a token for project %s: %v", project, err)
	}
	return resp.GetSecret()
}

// Machines lists the machines that hold their volume.
func (s *Site) Machines(tb TB) []*depotv1.Machine {
	tb.Helper()
	resp, err := s.Admin(tb).Admin.ListMachines(tb.Context(), &depotv1.ListMachinesRequest{})
	if err != nil {
		tb.Fatalf("list machines: %v", err)
	}
	return resp.GetMachines()
}

// Home is a client's home: a directory with a Docker configuration of its own,
// in which the plugin is installed.
type Home struct {
	Dir string
	// Env is added to the environment of its commands.
	Env []string
	// Work is the directory that commands run in; empty means Dir.
	Work string
	site *Site
}

// NewHome makes a home whose commands carry the token and the server's URL in
// the environment.
func (s *Site) NewHome(tb TB, token string) *Home {
	tb.Helper()
	h := &Home{Dir: tb.TempDir(), site: s}
	plugins := filepath.Join(h.Docker(), "cli-plugins")
	if err := os.MkdirAll(plugins, 0o700); err != nil {
		tb.Fatalf("home: %v", err)
	}
	for _, name := range []string{"docker-buildx", "docker-depot"} {
		if err := os.Symlink(filepath.Join(s.bin, name), filepath.Join(plugins, name)); err != nil {
			tb.Fatalf("install %s: %v", name, err)
		}
	}
	if token != "" {
		h.Env = append(h.Env, "DEPOT_TOKEN="+token)
	}
	h.Env = append(h.Env, "DEPOT_API_URL="+s.URL())
	return h
}

// Docker is the home's Docker configuration directory.
func (h *Home) Docker() string { return filepath.Join(h.Dir, ".docker") }

// With returns the home with more in its environment.
func (h *Home) With(env ...string) *Home {
	c := *h
	c.Env = append(append([]string(nil), h.Env...), env...)
	return &c
}

// In returns the home with commands run in dir.
func (h *Home) In(dir string) *Home {
	c := *h
	c.Work = dir
	return &c
}

// Result is what a command did.
type Result struct {
	// Out and Err are what it printed.
	Out, Err string
	// Code is its exit code; -1 if a signal ended it.
	Code int
}

// All is everything that the command printed.
func (r Result) All() string { return r.Out + r.Err }

// Command returns a command of the home's, not started.
func (h *Home) Command(ctx context.Context, args ...string) *exec.Cmd {
	args = h.site.ClientNet.Enter(args...)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...) //nolint:gosec // the test's own arguments
	cmd.Env = append(Environ(), append([]string{
		"HOME=" + h.Dir, "DOCKER_CONFIG=" + h.Docker(),
	}, h.Env...)...)
	cmd.Dir = h.Dir
	if h.Work != "" {
		cmd.Dir = h.Work
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// Try runs a command to its end, whatever that is.
func (h *Home) Try(tb TB, args ...string) Result {
	tb.Helper()
	var out, errOut bytes.Buffer
	cmd := h.Command(tb.Context(), args...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		tb.Fatalf("%s: %v", strings.Join(args, " "), err)
	}
	return Result{Out: out.String(), Err: errOut.String(), Code: cmd.ProcessState.ExitCode()}
}

// Run runs a command that has to succeed.
func (h *Home) Run(tb TB, args ...string) Result {
	tb.Helper()
	r := h.Try(tb, args...)
	if r.Code != 0 {
		tb.Fatalf("%s: exit code %d:\n%s", strings.Join(args, " "), r.Code, r.All())
	}
	return r
}

// Buildx runs the plugin on its own, as Compose does, and it has to succeed.
func (h *Home) Buildx(tb TB, args ...string) Result {
	tb.Helper()
	return h.Run(tb, append([]string{filepath.Join(h.site.bin, "docker-buildx")}, args...)...)
}

// TryBuildx is Buildx, whatever comes of it.
func (h *Home) TryBuildx(tb TB, args ...string) Result {
	tb.Helper()
	return h.Try(tb, append([]string{filepath.Join(h.site.bin, "docker-buildx")}, args...)...)
}

// Depot runs `docker depot` on its own, and it has to succeed.
func (h *Home) Depot(tb TB, args ...string) Result {
	tb.Helper()
	return h.Run(tb, append([]string{filepath.Join(h.site.bin, "docker-depot")}, args...)...)
}

// CLI runs the Docker CLI, and it has to succeed.
func (h *Home) CLI(tb TB, args ...string) Result {
	tb.Helper()
	return h.Run(tb, append([]string{filepath.Join(Deps(tb), "bin", "docker")}, args...)...)
}

// TryCLI is CLI, whatever comes of it.
func (h *Home) TryCLI(tb TB, args ...string) Result {
	tb.Helper()
	return h.Try(tb, append([]string{filepath.Join(Deps(tb), "bin", "docker")}, args...)...)
}

// CreateBuilder makes the builder "depot" for a project and makes it current.
func (h *Home) CreateBuilder(tb TB, project string) {
	tb.Helper()
	h.Buildx(tb, "create", "--driver", "depot", "--name", "depot", "--use", h.site.Endpoint(project))
}

// Endpoint is a project's address for `create`.
func (s *Site) Endpoint(project string) string {
	return "depot://" + s.ControlPlaneAddress + ":8443/default/" + project
}

// Context writes a build context into a directory of the test's and returns
// it. Files maps names to contents; busybox is added for the native
// architecture as "busybox".
func Context(tb TB, files map[string]string) string {
	tb.Helper()
	dir := tb.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
			tb.Fatalf("context: %v", err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			tb.Fatalf("context: %v", err)
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		tb.Fatalf("Debian's busybox-static is needed: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "busybox"), busybox, 0o755); err != nil { //nolint:gosec // a program
		tb.Fatalf("context: %v", err)
	}
	return dir
}
