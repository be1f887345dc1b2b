package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/opendepot/depot/e2e/site"
)

// dockerfile has steps whose output shows where and when they ran.
const dockerfile = `FROM scratch AS base
COPY busybox /bin/busybox
RUN ["/bin/busybox","--install","-s","/bin"]
FROM base AS app
RUN echo "machine $(hostname) $(uname -m)" > /machine
COPY message /message
RUN cat /message /machine > /result && cat /proc/sys/kernel/random/uuid >> /stamp
FROM scratch
COPY --from=app /result /stamp /
`

// newProject makes a site with one host and a home with a builder for the
// project "web".
func newProject(t *testing.T) (*site.Site, *site.Host, *site.Home) {
	t.Helper()
	s := site.New(t, site.Config{})
	h := s.AddHost(t, site.HostConfig{})
	s.CreateProject(t, "web", nil)
	home := s.NewHome(t, s.ProjectToken(t, "web"))
	home.CreateBuilder(t, "web")
	return s, h, home
}

// TestColdWarmChanged builds on no machine, builds again, changes a line and
// builds again: what did not change is cached, and what did is not.
func TestColdWarmChanged(t *testing.T) {
	t.Parallel()
	s, _, home := newProject(t)
	dir := site.Context(t, map[string]string{"Dockerfile": dockerfile, "message": "one\n"})
	out := filepath.Join(home.Dir, "out")
	build := func() (result, stamp, log string) {
		r := home.Buildx(t, "build", "--progress", "plain", "-o", "type=local,dest="+out, dir)
		return read(t, filepath.Join(out, "result")), read(t, filepath.Join(out, "stamp")), r.All()
	}
	cold, coldStamp, log := build()
	if !strings.HasPrefix(cold, "one\n") || !strings.Contains(log, "[depot] waiting for an amd64 machine") {
		t.Errorf("cold build gave %q; its progress:\n%s", cold, log)
	}
	s.WaitMachines(t, 1)
	warm, warmStamp, log := build()
	if warm != cold || warmStamp != coldStamp || !strings.Contains(log, "CACHED") {
		t.Errorf("warm build gave %q at %s, the cold one %q at %s", warm, warmStamp, cold, coldStamp)
	}
	if err := os.WriteFile(filepath.Join(dir, "message"), []byte("two\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	changed, changedStamp, log := build()
	if !strings.HasPrefix(changed, "two\n") || changedStamp == coldStamp {
		t.Errorf("changed build gave %q at %s, the cold one was at %s", changed, changedStamp, coldStamp)
	}
	if n := strings.Count(log, "CACHED"); n != 3 {
		t.Errorf("changed build had %d cached steps, want the 3 before the change:\n%s", n, log)
	}
}

// TestCacheOutlivesMachine builds, has the machine stop, and builds again: on
// another machine, from the same cache.
func TestCacheOutlivesMachine(t *testing.T) {
	t.Parallel()
	s, _, home := newProject(t)
	dir := site.Context(t, map[string]string{"Dockerfile": dockerfile, "message": "one\n"})
	home.Buildx(t, "build", dir)
	first := s.Machines(t)[0].GetId()
	stopMachine(t, s, first)
	r := home.Buildx(t, "build", "--progress", "plain", dir)
	if again := s.Machines(t)[0].GetId(); again == first {
		t.Errorf("machine %s was not replaced", first)
	}
	if n := strings.Count(r.All(), "CACHED"); n != 6 {
		t.Errorf("%d cached steps on the second machine, want all 6:\n%s", n, r.All())
	}
}

// TestTwentyBuildsShareOneMachine runs 20 builds at once in one project, and
// one in another: two machines, and never a shared one.
func TestTwentyBuildsShareOneMachine(t *testing.T) {
	t.Parallel()
	s, h, home := newProject(t)
	s.CreateProject(t, "other", nil)
	other := s.NewHome(t, s.ProjectToken(t, "other"))
	other.CreateBuilder(t, "other")
	dir := site.Context(t, map[string]string{
		"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\nARG N\nRUN [\"/bin/busybox\",\"sleep\",\"1\"]\nRUN [\"/bin/busybox\",\"touch\",\"/here\"]\n",
	})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if r := home.TryBuildx(t, "build", dir); r.Code != 0 {
				t.Errorf("build: exit code %d:\n%s", r.Code, r.All())
			}
		})
	}
	wg.Go(func() {
		if r := other.TryBuildx(t, "build", dir); r.Code != 0 {
			t.Errorf("build of the other project: exit code %d:\n%s", r.Code, r.All())
		}
	})
	wg.Wait()
	byProject := map[string]int{}
	volumes := map[string]bool{}
	for _, m := range s.Machines(t) {
		byProject[m.GetProject()]++
		volumes[m.GetVolumeId()] = true
	}
	if byProject["default/web"] != 1 || byProject["default/other"] != 1 || len(volumes) != 2 {
		t.Errorf("machines by project %v on %d volumes, want one each on its own", byProject, len(volumes))
	}
	if n := len(h.Processes(t, "buildkitd")); n != 2 {
		t.Errorf("the host runs %d buildkitds, want 2", n)
	}
}

// TestListingLaunchesNothing lists and inspects, and no machine starts.
func TestListingLaunchesNothing(t *testing.T) {
	t.Parallel()
	s, _, home := newProject(t)
	ls := home.TryBuildx(t, "ls")
	if !strings.Contains(ls.Out, "depot") || !strings.Contains(ls.Out, "inactive") {
		t.Errorf("ls:\n%s", ls.All())
	}
	home.Buildx(t, "inspect", "depot")
	if m := s.Machines(t); len(m) != 0 {
		t.Errorf("listing launched %v", m)
	}
	home.Buildx(t, "inspect", "--bootstrap", "depot")
	s.WaitMachines(t, 1)
	if ls := home.TryBuildx(t, "ls"); !strings.Contains(ls.Out, "running") {
		t.Errorf("ls with a machine:\n%s", ls.All())
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
