package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/opendepot/depot/e2e/site"
)

// TestClients builds with each of the clients after `docker depot configure`.
func TestClients(t *testing.T) {
	t.Parallel()
	s := site.New(t, site.Config{})
	s.AddHost(t, site.HostConfig{})
	s.CreateProject(t, "web", nil)
	engine := s.StartEngine(t)
	bare := s.NewHome(t, s.ProjectToken(t, "web"))
	home := bare.With("DOCKER_HOST=" + engine.Host)
	dir := site.Context(t, map[string]string{
		"Dockerfile": dockerfile, "message": "one\n",
		"docker-bake.json": `{"target": {"default": {"tags": ["baked"], "output": ["type=docker"]}}}`,
		"compose.yaml":     compose,
	})
	home.CLI(t, "depot", "configure", "--project", "web")

	t.Run("docker build", func(t *testing.T) {
		home.CLI(t, "build", "--progress", "plain", "-t", "unloaded", dir)
		if r := home.TryCLI(t, "image", "inspect", "unloaded"); r.Code == 0 {
			t.Errorf("an image was loaded though nobody asked for it:\n%s", r.All())
		}
		r := home.CLI(t, "build", "--progress", "plain", "-t", "built", "--load", dir)
		wantCached(t, 6, r)
		wantImage(t, home, "built")
	})
	t.Run("buildx build", func(t *testing.T) {
		wantCached(t, 6, home.CLI(t, "buildx", "build", "--progress", "plain", "-t", "buildxed", "--load", dir))
		wantImage(t, home, "buildxed")
	})
	t.Run("buildx bake", func(t *testing.T) {
		wantCached(t, 6, home.In(dir).CLI(t, "buildx", "bake", "-f", "docker-bake.json", "--progress", "plain"))
		wantImage(t, home, "baked")
	})
	t.Run("compose", func(t *testing.T) { composeBuilds(t, home.In(dir)) })
	t.Run("default load", func(t *testing.T) {
		home.CLI(t, "depot", "configure", "--project", "web", "--default-load")
		wantCached(t, 6, home.CLI(t, "build", "--progress", "plain", "-t", "loaded", dir))
		wantImage(t, home, "loaded")

		// Without an engine nothing is solved, and the way out works.
		gone := home.With("DOCKER_HOST=unix:///nonexistent.sock")
		r := gone.TryCLI(t, "build", "--progress", "plain", "-t", "x", dir)
		if r.Code != 1 || !strings.Contains(r.Err, "no Docker Engine answers") || !strings.Contains(r.Err, "BUILDX_NO_DEFAULT_LOAD=1") ||
			strings.Contains(r.Err, "[base ") {
			t.Errorf("exit code %d:\n%s", r.Code, r.All())
		}
		wantCached(t, 6, gone.With("BUILDX_NO_DEFAULT_LOAD=1").CLI(t, "build", "--progress", "plain", dir))
		r = gone.TryCLI(t, "buildx", "build", "--load", "-t", "x", dir)
		if r.Code != 1 || !strings.Contains(r.Err, "no Docker Engine answers") {
			t.Errorf("--load: exit code %d:\n%s", r.Code, r.All())
		}
	})
	if m := s.Machines(t); len(m) != 1 {
		t.Errorf("the clients used %d machines, want one", len(m))
	}
}

// wantCached wants a build to be answered by the cache alone, step by step.
func wantCached(t *testing.T, steps int, r site.Result) {
	t.Helper()
	if n := strings.Count(r.All(), "CACHED"); n != steps {
		t.Errorf("%d steps were cached, want all %d:\n%s", n, steps, r.All())
	}
}

// wantImage wants the engine to have an image of dockerfile.
func wantImage(t *testing.T, home *site.Home, tag string) {
	t.Helper()
	if r := home.TryCLI(t, "image", "inspect", "--format", "{{.Os}}/{{.Architecture}} {{len .RootFS.Layers}}", tag); r.Out != "linux/"+site.NativeArch()+" 1\n" {
		t.Errorf("image %s: %s", tag, r.All())
	}
}

// TestCreate makes builders in each way, and removes them.
func TestCreate(t *testing.T) {
	t.Parallel()
	s := site.New(t, site.Config{})
	s.AddHost(t, site.HostConfig{})
	project := s.CreateProject(t, "web", nil)
	s.CreateProject(t, "other", nil)
	token := s.ProjectToken(t, "web")
	endpoint := s.Endpoint("web") + "/" + site.NativeArch()
	dir := site.Context(t, map[string]string{"Dockerfile": dockerfile, "message": "one\n"})

	t.Run("endpoints", func(t *testing.T) {
		below := filepath.Join(t.TempDir(), "depot", "below")
		if err := os.MkdirAll(below, 0o750); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(below, "..", "depot.json"), []byte(`{"id": "`+project.GetId()+`"}`), 0o600); err != nil {
			t.Fatal(err)
		}
		admin := s.NewHome(t, s.AdminToken(t)) // for whom no project is the only one
		login := s.NewHome(t, "")
		login.Env = []string{"DBUS_SESSION_BUS_ADDRESS=disabled:"}
		file := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
		login.Run(t, "sh", "-c", `exec "$0" login --token-stdin "$1" < "$2"`, filepath.Join(site.Bin(t), "docker-depot"), s.URL(), file)
		for name, test := range map[string]struct {
			home *site.Home
			args []string
		}{
			"positional":            {admin, []string{s.Endpoint("web")}},
			"positional, no driver": {admin, []string{"--driver", "", s.Endpoint("web")}},
			"environment":           {admin.With("DEPOT_PROJECT_ID=" + project.GetId()), nil},
			"nearest depot.json":    {admin.In(below), nil},
			"stored login":          {login, nil},
		} {
			args := append([]string{"create", "--driver", "depot", "--name", "b"}, test.args...)
			test.home.Buildx(t, args...)
			if out := test.home.Buildx(t, "inspect", "b").Out; !strings.Contains(out, " "+endpoint+"\n") {
				t.Errorf("%s: want the endpoint %s:\n%s", name, endpoint, out)
			}
			test.home.Buildx(t, "rm", "b")
		}
	})

	home := s.NewHome(t, token)
	t.Run("wrong project", func(t *testing.T) {
		r := home.TryBuildx(t, "create", "--driver", "depot", "--name", "wrong", "--use", s.Endpoint("nowhere"))
		if r.Code != 1 || !strings.Contains(r.Err, "nowhere") {
			t.Errorf("exit code %d:\n%s", r.Code, r.All())
		}
		if ls := home.TryBuildx(t, "ls"); strings.Contains(ls.Out, "wrong") {
			t.Errorf("the builder was not taken back:\n%s", ls.Out)
		}
	})
	t.Run("use", func(t *testing.T) {
		there := home.With("DEPOT_PROJECT_ID=" + project.GetId())
		there.Buildx(t, "create", "--driver", "depot", "--name", "used", "--use")
		there.Buildx(t, "create", "--driver", "depot", "--name", "unused")
		if out := there.Buildx(t, "inspect").Out; !strings.HasPrefix(strings.ReplaceAll(out, " ", ""), "Name:used\n") {
			t.Errorf("the current builder is not the one of --use:\n%s", out)
		}
		if m := s.Machines(t); len(m) != 0 {
			t.Errorf("create launched %v", m)
		}
	})
	t.Run("bootstrap", func(t *testing.T) {
		home.Buildx(t, "create", "--driver", "depot", "--name", "boot", "--bootstrap", s.Endpoint("web"))
		if m := s.Machines(t); len(m) != 1 || m[0].GetReady() == nil {
			t.Errorf("machines after --bootstrap: %v", m)
		}
	})
	t.Run("cache stays", func(t *testing.T) {
		build := func() site.Result {
			home.CreateBuilder(t, "web")
			return home.Buildx(t, "build", "--progress", "plain", dir)
		}
		build()
		machine := s.Machines(t)[0].GetId()
		home.Buildx(t, "stop", "depot")
		wantCached(t, 6, home.Buildx(t, "build", "--progress", "plain", dir))
		home.Buildx(t, "rm", "depot")
		wantCached(t, 6, build())
		if m := s.Machines(t); len(m) != 1 || m[0].GetId() != machine {
			t.Errorf("stop or rm ended the machine %s, there is %v", machine, m)
		}
	})
}

// TestInterrupt presses Ctrl-C while a build waits for a machine, and while it
// runs: the lease is released at once, and nothing goes on.
func TestInterrupt(t *testing.T) {
	t.Parallel()
	s := site.New(t, site.Config{})
	h := s.AddHost(t, site.HostConfig{Pools: []string{"arch=" + site.NativeArch() + ",max=1"}})
	homes := map[string]*site.Home{}
	for _, name := range []string{"web", "other"} {
		s.CreateProject(t, name, nil)
		homes[name] = s.NewHome(t, s.ProjectToken(t, name))
		homes[name].CreateBuilder(t, name)
	}
	dir := site.Context(t, map[string]string{
		"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\",\"sleep\",\"987654\"]\n",
	})
	running := homes["other"].Start(t, nil, filepath.Join(site.Deps(t), "bin", "docker"), "buildx", "build", "--progress", "plain", dir)
	running.WaitOutput(t, `RUN ["/bin/busybox","sleep"`)
	site.Eventually(t, "the step runs", func() bool { return len(h.Processes(t, "busybox")) == 1 })
	machine := s.Machines(t)[0].GetId()
	if ready := "machine " + machine + " is ready, after "; !strings.Contains(running.Output(), ready) {
		t.Errorf("progress does not say %q:\n%s", ready, running.Output())
	}

	// The host's only machine is taken.
	waiting := homes["web"].StartBuildx(t, "build", "--progress", "plain", dir)
	waiting.WaitOutput(t, "[depot] waiting for an "+site.NativeArch()+" machine")
	waiting.WaitOutput(t, "pool local-"+site.NativeArch()+" of host host1 is full (1 of 1 machines run")
	before := released(t, s)
	wantInterrupted(t, waiting)
	if n := released(t, s) - before; n != 1 {
		t.Errorf("Ctrl-C released %d leases, want the waiting one", n)
	}
	if m := s.Machines(t); len(m) != 1 || m[0].GetLeases() != 1 {
		t.Errorf("machines are %v, want only the first one with its lease", m)
	}

	wantInterrupted(t, running)
	site.Eventually(t, "the step has ended", func() bool { return len(h.Processes(t, "busybox")) == 0 })
	if n := released(t, s) - before; n != 2 {
		t.Errorf("Ctrl-C released %d leases, want also that of the build", n-1)
	}
	if m := s.Machines(t); len(m) != 1 || m[0].GetId() != machine || m[0].GetLeases() != 0 {
		t.Errorf("machines are %v, want %s without a lease", m, machine)
	}
	homes["other"].Buildx(t, "build", "--call", "check", dir)
}

// released is how many leases clients have given back.
func released(t *testing.T, s *site.Site) int {
	t.Helper()
	n := 0
	for line := range strings.Lines(string(get(t, s.ControlPlaneNet, "http://127.0.0.1:8445/metrics"))) {
		if strings.HasPrefix(line, "depot_calls_total") && strings.Contains(line, "ReleaseLease") && strings.Contains(line, `code="ok"`) {
			count, err := strconv.Atoi(strings.Fields(line)[1])
			if err != nil {
				t.Fatalf("metrics: %q", line)
			}
			n += count
		}
	}
	return n
}

// wantInterrupted presses Ctrl-C, and wants the exit code that shells and
// buildx give it.
func wantInterrupted(t *testing.T, r *site.Running) {
	t.Helper()
	if got := r.Interrupt(t); got.Code != 130 {
		t.Errorf("exit code %d after Ctrl-C, want 130:\n%s", got.Code, got.Out)
	}
}
