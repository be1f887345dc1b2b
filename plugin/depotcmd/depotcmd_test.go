package depotcmd

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/google/go-cmp/cmp"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/api/depot/v1/depotv1connect"
	"github.com/opendepot/depot/driver/credentials"
	"github.com/opendepot/depot/plugin/servertest"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

var update = flag.Bool("update", false, "write golden files and docs/commands.md") //nolint:gochecknoglobals // the test program's flag

// adminService is a control plane with fixed contents that records changes.
type adminService struct {
	depotv1connect.UnimplementedAdminServiceHandler
	calls []string
	last  any
}

func (s *adminService) did(name string, req any) { s.calls, s.last = append(s.calls, name), req }

func (s *adminService) WhoAmI(context.Context, *depotv1.WhoAmIRequest) (*depotv1.WhoAmIResponse, error) {
	return &depotv1.WhoAmIResponse{
		PrincipalId: "tok_1", Kind: "user", Name: "ada", Organization: "acme", Role: "admin",
		ServerId: "srv_1", ServerVersion: "v1.0.0", ServerTime: timestamppb.Now(),
	}, nil
}

func project(name string) *depotv1.Project {
	size, bytes, machines := "default", int64(50<<30), int32(2)
	return &depotv1.Project{
		Id: "prj_" + name, Organization: "acme", Name: name, Created: timestamppb.New(time.Now().Add(-3 * time.Hour)),
		Settings: &depotv1.ProjectSettings{
			Size: &size, IdleTimeout: durationpb.New(2 * time.Minute), CacheKeep: durationpb.New(14 * 24 * time.Hour),
			CacheBytes: &bytes, MaxMachines: &machines,
		},
	}
}

func (s *adminService) ListProjects(context.Context, *depotv1.ListProjectsRequest) (*depotv1.ListProjectsResponse, error) {
	return &depotv1.ListProjectsResponse{Projects: []*depotv1.Project{project("api"), project("web")}}, nil
}

func (s *adminService) GetProject(_ context.Context, req *depotv1.GetProjectRequest) (*depotv1.GetProjectResponse, error) {
	if name := req.GetProject().GetName(); name != "web" {
		return nil, connect.NewError(connect.CodeNotFound, errors.New(`project "`+name+`" does not exist`))
	}
	return &depotv1.GetProjectResponse{Project: project("web")}, nil
}

func (s *adminService) CreateProject(_ context.Context, req *depotv1.CreateProjectRequest) (*depotv1.CreateProjectResponse, error) {
	s.did("CreateProject", req)
	return &depotv1.CreateProjectResponse{Project: project(req.GetName())}, nil
}

func (s *adminService) UpdateProject(_ context.Context, req *depotv1.UpdateProjectRequest) (*depotv1.UpdateProjectResponse, error) {
	s.did("UpdateProject", req)
	return &depotv1.UpdateProjectResponse{Project: project("web")}, nil
}

func (s *adminService) DeleteProject(_ context.Context, req *depotv1.DeleteProjectRequest) (*depotv1.DeleteProjectResponse, error) {
	s.did("DeleteProject", req)
	return &depotv1.DeleteProjectResponse{}, nil
}

func (s *adminService) CreateToken(_ context.Context, req *depotv1.CreateTokenRequest) (*depotv1.CreateTokenResponse, error) {
	s.did("CreateToken", req)
	return &depotv1.CreateTokenResponse{Token: &depotv1.Token{Id: "tok_2", Name: req.GetName()}, Secret: "the-secret"}, nil
}

func (s *adminService) ListTokens(context.Context, *depotv1.ListTokensRequest) (*depotv1.ListTokensResponse, error) {
	return &depotv1.ListTokensResponse{Tokens: []*depotv1.Token{
		{Id: "tok_1", Kind: "user", Name: "ada", Organization: "acme", Role: "admin", Created: timestamppb.New(time.Now().Add(-48 * time.Hour))},
		{
			Id: "tok_2", Kind: "project", Name: "ci", Organization: "acme", Project: "web", Role: "builder",
			Created: timestamppb.New(time.Now().Add(-2 * time.Hour)), Expires: timestamppb.New(time.Now().Add(-time.Hour)),
		},
	}}, nil
}

// ListMachines answers in two pages.
func (s *adminService) ListMachines(_ context.Context, req *depotv1.ListMachinesRequest) (*depotv1.ListMachinesResponse, error) {
	m := &depotv1.Machine{
		Id: "mch_1", Project: "acme/web", Arch: "amd64", State: depotv1.MachineState_MACHINE_STATE_READY, Agent: "one",
		Pool: "local-amd64", Leases: 2, Cpus: 16, MemoryBytes: 32 << 30, Created: timestamppb.New(time.Now().Add(-10 * time.Minute)),
	}
	if req.GetPage().GetToken() == "" {
		return &depotv1.ListMachinesResponse{Machines: []*depotv1.Machine{m}, NextPageToken: "2"}, nil
	}
	m.Id, m.Arch, m.Emulated, m.State, m.Reason = "mch_2", "arm64", true, depotv1.MachineState_MACHINE_STATE_DRAINING, "idle"
	return &depotv1.ListMachinesResponse{Machines: []*depotv1.Machine{m}}, nil
}

func (s *adminService) StopMachine(_ context.Context, req *depotv1.StopMachineRequest) (*depotv1.StopMachineResponse, error) {
	s.did("StopMachine "+req.GetId(), req)
	if req.GetId() == "mch_9" {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("machine mch_9 does not exist"))
	}
	return &depotv1.StopMachineResponse{}, nil
}

func (s *adminService) ListPools(context.Context, *depotv1.ListPoolsRequest) (*depotv1.ListPoolsResponse, error) {
	return &depotv1.ListPoolsResponse{Pools: []*depotv1.PoolInfo{
		{Agent: "one", Connected: true, Machines: 1, Pool: &depotv1.Pool{Name: "local-amd64", Provider: "local", Arch: "amd64", MaxMachines: 4, Cpus: 8, MemoryBytes: 16 << 30}},
		{Agent: "one", Pool: &depotv1.Pool{Name: "local-arm64", Provider: "local", Arch: "arm64", Emulated: true, MaxMachines: 4, Cpus: 8, MemoryBytes: 16 << 30, Closed: "disk full", Warnings: []string{"several times slower"}}},
	}}, nil
}

func (s *adminService) ListAgents(context.Context, *depotv1.ListAgentsRequest) (*depotv1.ListAgentsResponse, error) {
	return &depotv1.ListAgentsResponse{Agents: []*depotv1.Agent{
		{Id: "agt_1", Name: "one", Connected: true, LastSeen: timestamppb.New(time.Now().Add(-5 * time.Second)), Version: "v1.0.0", Pools: []string{"local-amd64", "local-arm64"}},
	}}, nil
}

// bench runs commands against a server of its own.
type bench struct {
	t       *testing.T
	service *adminService
	env     map[string]string
	store   credentials.Store
	dir     string
	url     string
	token   string
	in      string
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, service: &adminService{}, env: map[string]string{}, dir: t.TempDir()}
	_, handler := depotv1connect.NewAdminServiceHandler(b.service)
	b.url, b.token = servertest.Start(t, handler)
	logins := t.TempDir()
	b.store = credentials.Store{Dir: func() string { return logins }, NoKeyring: true}
	b.env[credentials.EnvURL], b.env[credentials.EnvToken] = b.url, b.token
	return b
}

func (b *bench) deps() Deps {
	return Deps{Version: "v1.0.0", Executable: os.Args[0], Source: credentials.Source{
		Env: func(k string) string { return b.env[k] }, Dir: b.dir, Store: b.store,
	}}
}

// run runs a command line and returns what it wrote.
func (b *bench) run(args ...string) (out, errOut string, err error) {
	b.t.Helper()
	var stdout, stderr bytes.Buffer
	dockerCli, err := command.NewDockerCli(
		command.WithInputStream(io.NopCloser(strings.NewReader(b.in))), command.WithOutputStream(&stdout), command.WithErrorStream(&stderr))
	if err != nil {
		b.t.Fatal(err)
	}
	cmd := NewDepotCommand(dockerCli, b.deps())
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetArgs(args)
	cmd.SetOut(&stdout)
	cmd.SetErr(&stderr)
	err = cmd.ExecuteContext(b.t.Context())
	return stdout.String(), stderr.String(), err
}

func TestListings(t *testing.T) {
	t.Parallel()
	for name, args := range map[string]string{
		"project-ls":          "project ls",
		"project-ls-quiet":    "project ls -q",
		"project-ls-json":     "project ls --format json",
		"project-ls-template": "project ls --format {{.Name}}={{.CacheSize}}",
		"project-ls-columns":  "project ls --format table\x20{{.Name}}\\t{{.MaxMachines}}",
		"project-inspect":     "project inspect acme/web --format {{.Name}}-{{.IdleTimeout}}-{{.CacheBytes}}",
		"token-ls":            "token ls",
		"machine-ls":          "machine ls",
		"pool-ls":             "pool ls",
		"agent-ls":            "agent ls",
		"whoami":              "whoami --format {{.Name}}-{{.Role}}-{{.TokenFrom}}",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			words := strings.Split(args, " ")
			if name == "project-ls-columns" {
				words = []string{"project", "ls", "--format", `table {{.Name}}\t{{.MaxMachines}}`}
			}
			out, errOut, err := newBench(t).run(words...)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, filepath.Join("testdata", name+".golden"), out+errOut)
		})
	}
}

// golden compares with a file, or writes it with -update.
func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(got), 0o644)); err != nil { //nolint:gosec // a file of the repository
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path) //nolint:gosec // a file of the repository
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s, run go test -update to accept (-want +got):\n%s", path, diff)
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		args string
		env  map[string]string
		code int // 0 means a plain error, which ends the program with 1
		want string
	}{
		"unknown project":    {"project inspect nope", nil, 1, `"nope" does not exist`},
		"no name":            {"project create", nil, 125, "takes a name"},
		"two names":          {"project create a b", nil, 125, "takes a name"},
		"unknown flag":       {"project ls --nope", nil, 125, "unknown flag"},
		"unknown subcommand": {"project nope", nil, 125, `unknown command "docker depot project nope"`},
		"bad template":       {"project ls --format {{", nil, 125, "template"},
		"bad size":           {"project create --cache-size much web", nil, 125, "no size"},
		"nothing to update":  {"project update web", nil, 125, "nothing to change"},
		"bad project":        {"project inspect a/b/c", nil, 1, "names no project"},
		"rm unasked":         {"project rm acme/web", nil, 0, "--force"},
		"two scopes":         {"token create --project a --organization b x", nil, 125, "one of"},
		"past expiry":        {"token create --expires -1h x", nil, 125, "in the past"},
		"damaged token":      {"whoami", map[string]string{credentials.EnvToken: "depot_x"}, 0, credentials.EnvToken},
		"plain http":         {"whoami", map[string]string{credentials.EnvURL: "http://x"}, 0, "TLS only"},
		"nobody":             {"whoami", map[string]string{credentials.EnvURL: "", credentials.EnvToken: ""}, 0, "docker depot login"},
		"unreachable":        {"whoami", map[string]string{credentials.EnvURL: "https://127.0.0.1:1"}, 0, "cannot be reached"},
		"uninstall and more": {"configure --uninstall --project x", nil, 125, "no other option"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			maps.Copy(b.env, test.env)
			out, _, err := b.run(strings.Split(test.args, " ")...)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error = %v, want %q in it", err, test.want)
			}
			var status cli.StatusError
			if errors.As(err, &status) && status.StatusCode != test.code || test.code == 125 && status.StatusCode != 125 {
				t.Errorf("exit code = %d, want %d", status.StatusCode, test.code)
			}
			if len(b.service.calls) > 0 {
				t.Errorf("the server was changed by %v", b.service.calls)
			}
			if strings.TrimSpace(out) != "" && name != "unknown project" && name != "bad project" {
				t.Errorf("output = %q, want none", out)
			}
		})
	}
}

func TestChanges(t *testing.T) {
	t.Parallel()
	size := int64(10 << 30)
	idle := durationpb.New(5 * time.Minute)
	tests := map[string]struct {
		args, out string
		want      any
	}{
		"create": {"project create --cache-size 10GiB --idle-timeout 5m acme/new", "acme/new\n", &depotv1.CreateProjectRequest{
			Organization: "acme", Name: "new", Settings: &depotv1.ProjectSettings{CacheBytes: &size, IdleTimeout: idle},
		}},
		"update": {"project update --allow network.host acme/web", "acme/web\n", &depotv1.UpdateProjectRequest{
			Project:  &depotv1.ProjectRef{Organization: "acme", Name: "web"},
			Settings: &depotv1.ProjectSettings{Entitlements: &depotv1.EntitlementList{Names: []string{"network.host"}}},
		}},
		"rm":            {"project rm --force web", "web\n", &depotv1.DeleteProjectRequest{Project: &depotv1.ProjectRef{Id: "prj_web"}, Force: true}},
		"project token": {"token create --project acme/web --expires 1h ci", "the-secret\n", &depotv1.CreateTokenRequest{Kind: "project", Name: "ci", Project: &depotv1.ProjectRef{Organization: "acme", Name: "web"}, Lifetime: durationpb.New(time.Hour)}},
		"user token":    {"token create --organization acme --role admin ada", "the-secret\n", &depotv1.CreateTokenRequest{Kind: "user", Name: "ada", Role: "admin", Project: &depotv1.ProjectRef{Organization: "acme"}}},
		"agent token":   {"agent token two", "the-secret\n", &depotv1.CreateTokenRequest{Kind: "agent", Name: "two"}},
		"stop":          {"machine stop --now --force mch_1", "mch_1\n", &depotv1.StopMachineRequest{Id: "mch_1", Now: true}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			out, _, err := b.run(strings.Split(test.args, " ")...)
			if err != nil || out != test.out {
				t.Errorf("output = %q, %v, want %q", out, err, test.out)
			}
			if made, ok := b.service.last.(*depotv1.CreateProjectRequest); ok {
				if made.GetRequestId() == "" {
					t.Error("the request has no id")
				}
				made.RequestId = ""
			}
			if diff := cmp.Diff(test.want, b.service.last, protocmp.Transform()); diff != "" {
				t.Errorf("request (-want +got):\n%s", diff)
			}
		})
	}
}

// As another user than root, `up` and `down` change nothing and name the one
// command to run.
func TestNeedRoot(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		uid  int
		want string
	}{
		"root":    {0, ""},
		"another": {1000, "sudo "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			dockerCli, err := command.NewDockerCli()
			if err != nil {
				t.Fatal(err)
			}
			a := &app{cli: dockerCli, deps: b.deps()}
			cmd := a.upCommand()
			if err := cmd.ParseFlags([]string{"--port", "9000"}); err != nil {
				t.Fatal(err)
			}
			err = a.needRoot(cmd, test.uid)
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), "up --port=9000")) {
				t.Errorf("needRoot(%d) = %v, want %q in it", test.uid, err, test.want)
			}
		})
	}
}

// Of several names, those that can be done are done, and each failure is told.
func TestOneOfSeveralFails(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	out, _, err := b.run("machine", "stop", "mch_1", "mch_9", "mch_2")
	if out != "mch_1\nmch_2\n" || err == nil || !strings.Contains(err.Error(), "mch_9 does not exist") {
		t.Errorf("output = %q, %v, want the two that were stopped and an error for the third", out, err)
	}
}

func TestLoginAndLogout(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.in = b.token + "\n"
	delete(b.env, credentials.EnvURL)
	delete(b.env, credentials.EnvToken)
	if _, _, err := b.run("login", "--token-stdin"); err == nil {
		t.Error("login without a server succeeded")
	}
	out, _, err := b.run("login", "--token-stdin", b.url)
	if err != nil || !strings.Contains(out, b.url) {
		t.Fatalf("login = %q, %v", out, err)
	}
	if strings.Contains(out, b.token) {
		t.Error("login shows the token")
	}
	if out, _, err := b.run("project", "ls", "-q"); err != nil || out != "prj_api\nprj_web\n" {
		t.Errorf("project ls = %q, %v", out, err)
	}
	for range 2 {
		if _, _, err := b.run("logout"); err != nil {
			t.Errorf("logout: %v", err)
		}
	}
	if _, _, err := b.run("whoami"); err == nil {
		t.Error("whoami succeeded after logout")
	}
	b.in = b.token[:len(b.token)-1] + "b"
	if _, _, err := b.run("login", "--token-stdin", b.url); err == nil || !strings.Contains(err.Error(), "pin") {
		t.Errorf("login with another server's pin = %v, want a refusal", err)
	}
}

func TestCompletion(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]string{ //nolint:gosec // no credentials
		"__complete project inspect ":          "acme/api\nacme/web\n:4\n",
		"__complete project inspect acme/api ": "acme/web\n:4\n",
		"__complete machine stop ":             "mch_1\nmch_2\n:4\n",
		"__complete token rm tok_1 ":           "tok_2\n:4\n",
		"__complete agent rm ":                 "agt_1\n:4\n",
		"__complete token create --role ":      "viewer\nbuilder\nadmin\n:4\n",
		"__complete configure --project ":      "acme/api\nacme/web\n:4\n",
		"__complete project create --allow ":   "network.host\nsecurity.insecure\n:4\n",
	} {
		out, _, err := newBench(t).run(strings.Split(args, " ")...)
		if err != nil || out != want {
			t.Errorf("%s = %q, %v, want %q", args, out, err, want)
		}
	}
}

// A web server that is no control plane is told from one.
func TestNotADepotServer(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.env[credentials.EnvURL], b.env[credentials.EnvToken] = servertest.Start(t, http.NotFoundHandler())
	if _, _, err := b.run("whoami"); err == nil || !strings.Contains(err.Error(), "depot control plane") {
		t.Errorf("whoami = %v, want it to say that this is no control plane", err)
	}
}

// docs/commands.md is written from the commands themselves.
func TestDocs(t *testing.T) {
	t.Parallel()
	dockerCli, err := command.NewDockerCli()
	if err != nil {
		t.Fatal(err)
	}
	var page strings.Builder
	page.WriteString("# Commands of `docker depot`\n\nWritten from the commands by `go test ./plugin/depotcmd -update`.\n")
	describeCommand(&page, NewDepotCommand(dockerCli, newBench(t).deps()))
	golden(t, filepath.Join("..", "..", "docs", "commands.md"), page.String())
}

func describeCommand(page *strings.Builder, cmd *cobra.Command) {
	if !cmd.HasSubCommands() {
		page.WriteString("\n## docker " + commandPath(cmd) + "\n\n")
		text := cmd.Long
		if text == "" {
			text = cmd.Short + "."
		}
		page.WriteString(text + "\n\n```\ndocker " + usageLine(cmd) + "\n```\n")
		if cmd.Example != "" {
			page.WriteString("\nFor example:\n\n```\n" + cmd.Example + "\n```\n")
		}
		if flags := cmd.Flags().FlagUsagesWrapped(100); flags != "" {
			page.WriteString("\n```\n" + strings.TrimRight(flags, "\n") + "\n```\n")
		}
	}
	for _, sub := range cmd.Commands() {
		if sub.Name() != "help" && sub.Name() != "completion" {
			describeCommand(page, sub)
		}
	}
}
