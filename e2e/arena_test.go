package e2e

import (
	"archive/tar"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	_ "modernc.org/sqlite" // the store is read beside its owner, which may be dead

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/e2e/site"
)

// heldDockerfile has one RUN, which sleeps for $HOLD seconds: however that
// sleep ends, the RUN goes on to its end.
const heldDockerfile = `FROM scratch AS built
COPY busybox /bin/busybox
SHELL ["/bin/busybox", "sh", "-c"]
ARG NONCE
ARG HOLD
RUN /bin/busybox sleep $HOLD; echo "$NONCE" > /result
FROM scratch
COPY --from=built /result /
`

// uploadBytes is the size of a file in an uploaded context: larger than all
// that lies between a client and its machine can hold.
const uploadBytes = 32 << 20

// arena is a site in which programs are killed. Its builds can be held at any
// point of their lives, so that a kill meets them there.
type arena struct {
	t    *testing.T
	s    *site.Site
	h    *site.Host
	home *site.Home
	// context is a build context with heldDockerfile.
	context string
	// holdRunc is a file: while it exists, the host's runc creates nothing.
	holdRunc string
	rand     *rand.Rand
	builds   int
	store    *sql.DB // nil: not open
}

// holds makes the lengths of sleeps unique on this machine.
var holds atomic.Int64 //nolint:gochecknoglobals // see there

func newArena(t *testing.T, seed, stream uint64) *arena {
	t.Helper()
	a := arenaOn(t, site.New(t, site.Config{}), site.HostConfig{})
	a.rand = rand.New(rand.NewPCG(seed, stream)) //nolint:gosec // a seed can be repeated
	return a
}

// arenaOn makes an arena of a site, with one host.
func arenaOn(t *testing.T, s *site.Site, c site.HostConfig) *arena {
	t.Helper()
	a := &arena{t: t, s: s, holdRunc: filepath.Join(s.Dir, "hold-runc")}
	// The real runc, on a host that can be slow.
	runc := filepath.Join(s.Dir, "slow-runc")
	script := fmt.Sprintf("#!/bin/sh\ncase \" $* \" in *' create '*) while [ -e %s ]; do sleep 0.02; done;; esac\nexec %s \"$@\"\n", a.holdRunc, filepath.Join(site.Bin(t), "buildkit-runc"))
	if err := os.WriteFile(runc, []byte(script), 0o755); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	t.Cleanup(a.closeStore)
	c.Flags = append(c.Flags, "--runc", runc)
	a.h = s.AddHost(t, c)
	a.h.Watch(t)
	s.CreateProject(t, "web", nil)
	a.home = s.NewHome(t, s.ProjectToken(t, "web"))
	a.home.CreateBuilder(t, "web")
	a.context = site.Context(t, map[string]string{"Dockerfile": heldDockerfile})
	return a
}

// query reads one row, if there is one, of the control plane's store, whether or
// not a control plane runs.
func (a *arena) query(dest []any, query string, args ...any) {
	a.t.Helper()
	if a.store == nil {
		db, err := sql.Open("sqlite", "file:"+filepath.Join(a.s.ControlPlaneDir(), "depot.db")+"?_pragma=busy_timeout(10000)")
		if err != nil {
			a.t.Fatalf("open the store: %v", err)
		}
		db.SetMaxOpenConns(1)
		a.store = db
	}
	err := a.store.QueryRowContext(a.t.Context(), query, args...).Scan(dest...)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		a.t.Fatalf("read the store: %v", err)
	}
}

// closeStore has the next query open the store anew.
func (a *arena) closeStore() {
	if a.store != nil {
		a.store.Close() //nolint:errcheck,gosec // it was only read
		a.store = nil
	}
}

// count counts rows of the store.
func (a *arena) count(what string, args ...any) int {
	a.t.Helper()
	var n int
	a.query([]any{&n}, "SELECT count(*) FROM "+what, args...)
	return n
}

// build is a build of the arena's.
type build struct {
	*site.Running
	a     *arena
	nonce string
	hold  string // how long its RUN sleeps, in seconds
	dest  string
	after int64         // its lease is the first after this one
	rest  func()        // uploads the rest of its context; nil for none
	sent  *atomic.Int64 // bytes of its context that the client has taken
}

// start starts a build whose RUN sleeps for hold seconds; "held" means until
// [build.letGo].
func (a *arena) start(hold string) *build {
	a.t.Helper()
	return a.startFrom(hold, nil, a.context)
}

// startAs is start with another command than the plugin by itself.
func (a *arena) startAs(hold string, command ...string) *build {
	a.t.Helper()
	return a.startWith(hold, nil, a.context, command...)
}

func (a *arena) startFrom(hold string, stdin *os.File, context string) *build {
	a.t.Helper()
	return a.startWith(hold, stdin, context, filepath.Join(site.Bin(a.t), "docker-buildx"))
}

func (a *arena) startWith(hold string, stdin *os.File, context string, command ...string) *build {
	a.t.Helper()
	a.builds++
	if hold == "held" {
		hold = strconv.FormatInt(1_000_000+1000*int64(os.Getpid())+holds.Add(1), 10)
	}
	b := &build{a: a, nonce: fmt.Sprintf("%s-%d", a.t.Name(), a.builds), hold: hold, dest: filepath.Join(a.home.Dir, fmt.Sprintf("out%d", a.builds))}
	a.query([]any{&b.after}, "SELECT coalesce(max(seq), 0) FROM leases")
	b.Running = a.home.Start(a.t, stdin, append(command, "build", "--progress", "plain",
		"--build-arg", "NONCE="+b.nonce, "--build-arg", "HOLD="+hold, "-o", "type=local,dest="+b.dest, context)...)
	return b
}

// startUpload starts a build whose client reads its context from a pipe, and
// sends half of it.
func (a *arena) startUpload() *build {
	a.t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		a.t.Fatal(err)
	}
	b := a.startFrom("0", r, "-")
	r.Close() //nolint:errcheck,gosec // the client has its own
	b.sent = &atomic.Int64{}
	half, all, written := make(chan struct{}), make(chan struct{}), make(chan struct{})
	content, err := os.ReadFile(filepath.Join(a.context, "busybox"))
	if err != nil {
		a.t.Fatal(err)
	}
	go func() {
		defer close(written)
		defer w.Close() //nolint:errcheck // the client may be dead
		out := tar.NewWriter(io.MultiWriter(w, counter{b.sent}))
		junk := make([]byte, uploadBytes/2)
		file := func(name string, mode int64, size int) error {
			return out.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(size)})
		}
		write := func(p []byte) error { _, err := out.Write(p); return err }
		// Errors are the client's death, which the test sees by itself.
		for _, step := range []func() error{
			func() error { return file("Dockerfile", 0o644, len(heldDockerfile)) },
			func() error { return write([]byte(heldDockerfile)) },
			func() error { return file("busybox", 0o755, len(content)) },
			func() error { return write(content) },
			func() error { return file("junk", 0o644, uploadBytes) },
			func() error { return write(junk) },
			func() error { close(half); <-all; return nil },
			func() error { return write(junk) },
			out.Close,
		} {
			if step() != nil {
				return
			}
		}
	}()
	released := false
	b.rest = func() {
		if !released {
			released = true
			close(all)
		}
	}
	a.t.Cleanup(func() {
		b.rest()
		w.Close() //nolint:errcheck,gosec // it may be closed
		<-written
	})
	site.Eventually(a.t, "half of the context is sent", func() bool {
		select {
		case <-half:
			return true
		case <-written:
			return true
		case <-b.Ended():
			return true
		default:
			return false
		}
	})
	return b
}

// counter counts what is written.
type counter struct{ n *atomic.Int64 }

func (c counter) Write(p []byte) (int, error) {
	c.n.Add(int64(len(p)))
	return len(p), nil
}

// sleeper is the process that holds the build's RUN, or 0.
func (b *build) sleeper() int { return site.FindProcess("/bin/busybox", "sleep", b.hold) }

// standing is how a build stands in the control plane's store.
type standing struct {
	Lease, State, Reason                  string // of the lease
	Connected                             bool
	Machine, MachineState                 string
	Launched, Ready, Draining, Gone, Over bool
}

// stands reads how the build stands; the zero value before it has a lease.
func (b *build) stands() standing {
	b.a.t.Helper()
	var s standing
	b.a.query([]any{
		&s.Lease, &s.State, &s.Reason, &s.Connected, &s.Machine, &s.MachineState, &s.Launched, &s.Ready, &s.Draining, &s.Gone, &s.Over,
	}, `SELECT l.id, l.state, l.reason, l.connected, coalesce(m.id, ''), coalesce(m.state, ''), m.launched IS NOT NULL, m.ready IS NOT NULL,
		m.draining IS NOT NULL, m.gone IS NOT NULL, coalesce(m.state IN ('stopped', 'failed'), 0)
		FROM leases l LEFT JOIN machines m ON m.id = l.machine WHERE l.seq > ? ORDER BY l.seq LIMIT 1`, b.after)
	return s
}

// until waits until the build stands so; false if it ended before.
func (b *build) until(what string, so func(standing) bool) bool {
	b.a.t.Helper()
	ok := false
	site.Eventually(b.a.t, what, func() bool {
		if ok = so(b.stands()); ok {
			return true
		}
		return b.hasEnded()
	})
	return ok
}

func (b *build) hasEnded() bool {
	select {
	case <-b.Ended():
		return true
	default:
		return false
	}
}

// untilHeld waits until the build's RUN sleeps; false if it ended before.
func (b *build) untilHeld() bool {
	b.a.t.Helper()
	site.Eventually(b.a.t, "the build is in its RUN", func() bool { return b.sleeper() != 0 || b.hasEnded() })
	return !b.hasEnded()
}

// letGo ends what holds the build, if anything does.
func (b *build) letGo() {
	if b.rest != nil {
		b.rest()
	}
	if pid := b.sleeper(); pid != 0 {
		kill(pid)
	}
}

// succeeds waits for the build's end and checks its result.
func (b *build) succeeds() {
	b.a.t.Helper()
	if r := b.Wait(b.a.t); r.Code != 0 {
		b.a.t.Fatalf("the build ended with code %d:\n%s", r.Code, r.All())
	}
	b.isRight()
}

func (b *build) isRight() {
	b.a.t.Helper()
	if got := read(b.a.t, filepath.Join(b.dest, "result")); got != b.nonce+"\n" {
		b.a.t.Fatalf("the build's result is %q, want %q", got, b.nonce)
	}
}

// buildOnce builds and checks the result.
func (a *arena) buildOnce() {
	a.t.Helper()
	a.start("0").succeeds()
}

// machines are the ids of the machines that hold their volume.
func (a *arena) machines() []*depotv1.Machine {
	a.t.Helper()
	return a.s.Machines(a.t)
}

// stop has a machine drain.
func (a *arena) stop(machine string) {
	a.t.Helper()
	if _, err := a.s.Admin(a.t).Admin.StopMachine(a.t.Context(), &depotv1.StopMachineRequest{Id: machine}); err != nil {
		a.t.Fatalf("stop machine: %v", err)
	}
}

// fresh waits until no machine is left.
func (a *arena) fresh() {
	a.t.Helper()
	site.Eventually(a.t, "no machine is left", func() bool {
		all := a.machines()
		for _, m := range all {
			if m.GetState() == depotv1.MachineState_MACHINE_STATE_READY {
				a.stop(m.GetId())
			}
		}
		return len(all) == 0
	})
}

// consistent waits until the host runs exactly the machines that the store
// says it does, each with one buildkitd at most, on a volume of its own, and
// has nothing that belongs to any other.
func (a *arena) consistent() {
	a.t.Helper()
	var stored, running, strays []string
	for end := time.Now().Add(time.Minute); ; {
		stored, running = nil, nil
		for _, m := range a.machines() {
			stored = append(stored, m.GetId())
		}
		for _, p := range a.h.Processes(a.t, "depot-agent") {
			running = append(running, p.Machine)
		}
		slices.Sort(stored)
		slices.Sort(running)
		strays = a.h.Strays(a.t, stored)
		if slices.Equal(stored, running) && len(strays) == 0 {
			break
		}
		if time.Now().After(end) {
			a.t.Fatalf("after a minute the store has machines %v, the host runs %v and has strays %v", stored, running, strays)
		}
		<-time.After(20 * time.Millisecond)
	}
	volumes := map[string]bool{}
	for _, m := range a.machines() {
		if volumes[m.GetVolumeId()] {
			a.t.Errorf("one-writer: two machines have volume %s", m.GetVolumeId())
		}
		volumes[m.GetVolumeId()] = true
	}
	daemons := map[string]int{}
	for _, p := range a.h.Processes(a.t, "buildkitd") {
		if daemons[p.Machine]++; daemons[p.Machine] > 1 {
			a.t.Errorf("machine %s runs %d buildkitds", p.Machine, daemons[p.Machine])
		}
	}
}

// replaced returns args with one value in place of another.
func replaced(args []string, old, by string) []string {
	out := slices.Clone(args)
	for i, arg := range out {
		if arg == old {
			out[i] = by
		}
	}
	return out
}

func itoa(n uint64) string { return strconv.FormatUint(n, 10) }
