package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opendepot/depot/e2e/site"
)

// A victim is a program that is killed.
type victim string

const (
	theClient       victim = "client"
	theCloudAgent   victim = "cloud agent"
	theControlPlane victim = "control plane"
	theMachineAgent victim = "machine agent"
	theBuildkitd    victim = "buildkitd"
)

// dies reports whether the machine ends with the victim.
func (v victim) dies() bool { return v == theMachineAgent || v == theBuildkitd }

// attempt is one build that is brought into a window, to have a victim killed.
type attempt struct {
	*arena
	victim victim
	// build is the one in the window; other, if there is one, is another that
	// holds the window open.
	build, other *build
	machine      string // the build's, once it has one
	pid          int    // of the victim, where the window found it
	release      []func()
}

// letGo closes the window: the build goes on.
func (a *attempt) letGo() {
	for _, f := range slices.Backward(a.release) {
		f()
	}
	a.release = nil
}

// window is a part of a build's life that a kill has to meet.
type window struct {
	name string
	// open brings a build into the window and holds it there. False means that
	// it slipped through.
	open func(*attempt) bool
	// in says whether the build is in the window, before the kill and, with
	// killed set, after it.
	in func(a *attempt, killed bool) error
	// not says why a victim cannot be killed here.
	not map[victim]string
}

// windows are the parts of a build's life in their order.
func windows() []window {
	noMachine := map[victim]string{
		theMachineAgent: "the machine does not run yet",
		theBuildkitd:    "the machine does not run yet",
	}
	return []window{
		{name: "waiting", open: (*attempt).openWaiting, in: (*attempt).inWaiting, not: noMachine},
		{name: "launching", open: (*attempt).openLaunching, in: (*attempt).inLaunching, not: noMachine},
		{name: "registering", open: (*attempt).openRegistering, in: (*attempt).inRegistering},
		{name: "connecting", open: (*attempt).openConnecting, in: (*attempt).inConnecting},
		{name: "in mid-RUN", open: (*attempt).openRun, in: (*attempt).inRun},
		{name: "in mid-upload", open: (*attempt).openUpload, in: (*attempt).inUpload},
		{name: "draining", open: (*attempt).openDraining, in: (*attempt).inDraining},
		{name: "at random", open: (*attempt).openRandom, in: (*attempt).inRandom},
	}
}

// openWaiting: the machine drains, which takes as long as another build's RUN,
// and the lease waits for the next one.
func (a *attempt) openWaiting() bool {
	a.other = a.start("held")
	a.release = append(a.release, a.other.letGo)
	if !a.other.untilHeld() {
		return false
	}
	a.stop(a.other.stands().Machine)
	a.build = a.start("0")
	return a.build.until("a lease waits", func(s standing) bool { return s.State == "waiting" && strings.Contains(s.Reason, "is stopping") })
}

func (a *attempt) inWaiting(bool) error {
	s := a.build.stands()
	return want(s.State == "waiting" && s.Machine == "" && a.other.sleeper() != 0, "the lease waits without a machine", s)
}

// openLaunching: the host's runc creates nothing.
func (a *attempt) openLaunching() bool {
	a.fresh()
	if err := os.WriteFile(a.holdRunc, nil, 0o600); err != nil {
		a.t.Fatal(err)
	}
	a.release = append(a.release, func() { _ = os.Remove(a.holdRunc) })
	a.build = a.start("0")
	return a.build.until("a launch is under way", func(standing) bool { return a.inLaunching(false) == nil })
}

func (a *attempt) inLaunching(bool) error {
	s := a.build.stands()
	noted, _ := os.ReadFile(filepath.Join(a.h.StateDir, "machines", s.Machine))
	return want(s.State == "waiting" && s.MachineState == "pending" && string(noted) == "launching\n", "the lease waits and the agent launches", s)
}

// openRegistering: the machine agent is stopped before it can register, or
// buildkitd before it can answer.
func (a *attempt) openRegistering() bool {
	a.fresh()
	a.build = a.start("0")
	init := 0
	for ; init == 0 && !a.build.hasEnded(); <-time.After(time.Millisecond) {
		init = a.h.MachineInit("")
	}
	a.pid = init
	if a.victim == theBuildkitd {
		for a.pid = 0; a.pid == 0 && !a.build.hasEnded(); <-time.After(time.Millisecond) {
			a.pid = site.ChildOf(init, "buildkitd")
		}
	}
	if a.pid == 0 || syscall.Kill(a.pid, syscall.SIGSTOP) != nil {
		return false
	}
	a.machine = a.build.stands().Machine
	stopped := a.pid
	a.release = append(a.release, func() { _ = syscall.Kill(stopped, syscall.SIGCONT) })
	return a.build.until("the launch is reported", func(s standing) bool { return s.Launched })
}

func (a *attempt) inRegistering(killed bool) error {
	s := a.build.stands()
	return want(s.Launched && !s.Ready && (s.State == "waiting" || killed && a.victim.dies()), "the machine is launched and was never ready", s)
}

// openConnecting: the machine's ports do not answer.
func (a *attempt) openConnecting() bool {
	a.s.HostNet.Run(a.t, "nft", "add table inet e2e; add chain inet e2e doors { type filter hook input priority 0; }; add rule inet e2e doors tcp dport 24000-24099 drop")
	a.release = append(a.release, func() { a.s.HostNet.Run(a.t, "nft", "delete table inet e2e") })
	a.build = a.start("0")
	ok := a.build.until("the lease is ready", func(s standing) bool { return s.State == "ready" })
	a.machine = a.build.stands().Machine
	return ok
}

func (a *attempt) inConnecting(killed bool) error {
	s := a.build.stands()
	return want(s.Ready && !s.Connected && (s.State == "ready" || killed && a.victim.dies()), "the lease is ready and was never connected", s)
}

// openRun: the RUN sleeps.
func (a *attempt) openRun() bool {
	a.build = a.start("held")
	a.release = append(a.release, a.build.letGo)
	ok := a.build.untilHeld() && a.build.until("the connection is reported", func(s standing) bool { return s.Connected })
	a.machine = a.build.stands().Machine
	return ok
}

func (a *attempt) inRun(killed bool) error {
	s := a.build.stands()
	if killed && (a.victim.dies() || a.victim == theClient) {
		return nil // the RUN ended with the victim; nothing else can end it
	}
	return want(s.Connected && a.build.sleeper() != 0, "the RUN sleeps", s)
}

// openUpload: the client has sent half of its context, and gets no more.
func (a *attempt) openUpload() bool {
	a.build = a.startUpload()
	a.release = append(a.release, a.build.letGo)
	ok := a.build.until("the connection is reported", func(s standing) bool { return s.Connected })
	a.machine = a.build.stands().Machine
	return ok
}

func (a *attempt) inUpload(killed bool) error {
	s := a.build.stands()
	n := a.build.sent.Load()
	return want(s.Connected && n > uploadBytes/2 && n < uploadBytes && (killed || !a.build.hasEnded()), fmt.Sprintf("half is sent, not %d bytes", n), s)
}

// openDraining: the machine was asked to stop, and has a build to wait for.
func (a *attempt) openDraining() bool {
	if !a.openRun() {
		return false
	}
	a.stop(a.machine)
	return a.build.until("the machine drains", func(s standing) bool { return s.MachineState == "draining" })
}

func (a *attempt) inDraining(killed bool) error {
	s := a.build.stands()
	return want(s.Draining && (s.MachineState == "draining" || killed && a.victim.dies()), "the machine drains", s)
}

// openRandom: some moment of a build's life, cold or warm.
func (a *attempt) openRandom() bool {
	if a.rand.IntN(2) == 0 {
		a.fresh()
	}
	a.build = a.start("0.5")
	moment := time.Duration(a.rand.Int64N(int64(1500 * time.Millisecond)))
	if a.victim.dies() {
		if !a.build.until("the machine runs", func(s standing) bool { return a.h.MachineInit(s.Machine) != 0 }) {
			return false
		}
		a.machine = a.build.stands().Machine
		moment /= 2
	}
	select {
	case <-a.build.Ended():
	case <-time.After(moment):
	}
	return true
}

func (a *attempt) inRandom(killed bool) error {
	if !killed && a.build.hasEnded() {
		return errors.New("the build has ended")
	}
	return nil
}

func want(ok bool, what string, s standing) error {
	if ok {
		return nil
	}
	return fmt.Errorf("it is not so that %s: %+v", what, s)
}

// strike kills the victim and waits until it is gone. False means that it was
// not there.
func (a *attempt) strike() bool {
	switch a.victim {
	case theClient:
		kill(a.build.Pid())
		return a.build.Killed()
	case theCloudAgent:
		a.h.Agent.Kill(a.t)
	case theControlPlane:
		a.s.ControlPlane.Kill(a.t)
	case theMachineAgent, theBuildkitd:
		pid := a.pid
		if pid == 0 {
			pid = a.h.MachineInit(a.machine)
		}
		if a.victim == theBuildkitd && a.pid == 0 && pid != 0 {
			pid = site.ChildOf(pid, "buildkitd")
		}
		if pid == 0 || !kill(pid) {
			return false
		}
		site.Eventually(a.t, "the victim is gone", func() bool { return syscall.Kill(pid, 0) != nil })
	}
	return true
}

// kill ends a process of the test's own; false if it was not there.
func kill(pid int) bool { return syscall.Kill(pid, syscall.SIGKILL) == nil }

// revive starts what was killed, if it is a daemon of its own.
func (a *attempt) revive() {
	switch a.victim {
	case theCloudAgent:
		a.h.Start(a.t)
	case theControlPlane:
		a.s.StartControlPlane(a.t)
	case theClient, theMachineAgent, theBuildkitd:
	}
}

// outcome checks how the build ended whose victim was killed in a window.
func (a *attempt) outcome(w window) {
	a.t.Helper()
	if a.other != nil {
		a.other.succeeds()
	}
	r := a.build.Wait(a.t)
	switch {
	case a.victim == theClient:
		return
	case r.Code == 0:
		a.build.isRight()
		if a.victim.dies() && w.name != "registering" && w.name != "connecting" && w.name != "at random" {
			a.t.Errorf("the build went well though its machine was killed:\n%s", r.All())
		}
	case !a.victim.dies():
		a.t.Fatalf("builds-survive: the build ended with code %d:\n%s", r.Code, r.All())
	case w.name == "connecting":
		a.t.Errorf("a machine that dies while connecting is replaced, but the build ended with code %d:\n%s", r.Code, r.All())
	default:
		// say-why: which machine, why, and what became of the cache.
		for _, word := range []string{a.machine, "cache"} {
			if !strings.Contains(r.All(), word) {
				a.t.Errorf("the build's end does not name %q:\n%s", word, r.All())
			}
		}
	}
}

// once brings a build into a window, kills the victim, and checks what comes
// of it. It returns why the kill does not count; nil if it does.
func (a *arena) once(v victim, w window) error {
	a.t.Helper()
	at := &attempt{arena: a, victim: v}
	defer at.letGo()
	opened := w.open(at)
	var before, after error
	if !opened {
		before = errors.New("the build slipped through")
	} else {
		before = w.in(at, false)
	}
	struck := before == nil && at.strike()
	if struck {
		after = w.in(at, true)
	}
	if before == nil && !struck {
		before = errors.New("the victim was not there")
	}
	// The build goes on with the daemon dead, or alive again.
	if a.rand.IntN(2) == 0 {
		at.letGo()
	}
	if struck {
		at.revive()
	}
	at.letGo()
	if before != nil {
		at.build.Wait(a.t)
		if at.other != nil {
			at.other.succeeds()
		}
		return before
	}
	at.outcome(w)
	a.buildOnce()
	a.consistent()
	return after
}

// TestKills kills each program in each part of a build's life and at random,
// DEPOT_KILLS times each (5), by the random numbers of DEPOT_SEED. After each
// kill the invariants hold and the next build works; at the end nothing is
// left.
func TestKills(t *testing.T) {
	t.Parallel()
	kills := setting(t, "DEPOT_KILLS", 5)
	seed := setting(t, "DEPOT_SEED", uint64(time.Now().UnixNano()))
	t.Logf("seed: DEPOT_SEED=%d DEPOT_KILLS=%d", seed, kills)
	// All at once, whatever -parallel says: mostly they wait.
	var all sync.WaitGroup
	defer all.Wait()
	for i, v := range []victim{theCloudAgent, theClient, theControlPlane, theMachineAgent, theBuildkitd} {
		all.Go(func() {
			t.Run(string(v), func(t *testing.T) { killAll(t, v, kills, seed, uint64(i)) }) //nolint:gosec // a small number
		})
	}
}

// killAll kills one program in all its windows, in a site of its own.
func killAll(t *testing.T, v victim, kills, seed, stream uint64) {
	t.Helper()
	a := newArena(t, seed, stream)
	var table strings.Builder
	defer func() { report(t, fmt.Sprintf("kills of the %s with seed %d:\n%s", v, seed, &table)) }()
	for _, w := range windows() {
		if why := w.not[v]; why != "" {
			fmt.Fprintf(&table, "%-14s %-13s none: %s\n", v, w.name, why)
			continue
		}
		began, hit, missed := time.Now(), uint64(0), uint64(0)
		for hit < kills {
			err := a.once(v, w)
			if err == nil {
				hit++
				continue
			}
			t.Logf("%s %s: does not count: %v", v, w.name, err)
			if missed++; missed > 3+3*kills {
				t.Fatalf("%s %s: only %d of %d kills met their window; see above", v, w.name, hit, kills)
			}
		}
		fmt.Fprintf(&table, "%-14s %-13s %d kills, %d more missed the window (%s)\n", v, w.name, hit, missed, time.Since(began).Round(time.Second/10))
	}
	a.fresh()
	site.Eventually(t, "all leases have ended", func() bool { return a.count("leases WHERE state <> 'ended'") == 0 })
	if n := a.count("machines WHERE gone IS NULL"); n != 0 {
		t.Errorf("%d machines still hold their volume", n)
	}
}

// report logs what was done, and adds it to the file DEPOT_REPORT, because the
// logs of tests that passed are not shown.
func report(t *testing.T, text string) {
	t.Helper()
	t.Log(text)
	path := os.Getenv("DEPOT_REPORT") //nolint:forbidigo // this is the tests' main
	if path == "" {
		return
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600) //nolint:gosec // the caller of the tests says where
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.WriteString(f, text)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// setting reads a number from the environment.
func setting(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	text, ok := os.LookupEnv(name) //nolint:forbidigo // this is the tests' main
	if !ok || text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}
