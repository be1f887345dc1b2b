package site

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Watch watches the host until the end of the test, some forty times a second,
// and fails the test when one of the invariants is broken, for however short a
// time:
//
//   - one-writer: two machines that run have the same volume;
//   - a volume's writer epoch shrinks;
//   - a machine is launched twice.
func (h *Host) Watch(tb TB) {
	tb.Helper()
	w := &witness{h: h, tb: tb, machines: map[string]launchedAs{}, epochs: map[string]uint64{}, said: map[string]bool{}}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(25 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				w.look()
			}
		}
	}()
	tb.Cleanup(func() {
		close(stop)
		<-done
	})
}

// witness is the memory of Watch; only its goroutine uses it.
type witness struct {
	h        *Host
	tb       TB
	machines map[string]launchedAs // by machine
	epochs   map[string]uint64     // by pool and volume
	said     map[string]bool
}

// launchedAs tells one process from a later one of the same number.
type launchedAs struct {
	PID        int    `json:"pid"`
	StartTicks uint64 `json:"start_ticks"`
}

// launchRecord is what the local provider keeps of a machine, as far as it
// concerns a witness.
type launchRecord struct {
	launchedAs
	ID      string `json:"id"`
	Volume  string `json:"volume"`
	Started bool   `json:"started"`
}

func (w *witness) look() {
	writers := map[string]string{}
	for _, r := range w.h.records() {
		if !r.Started {
			continue
		}
		if first, ok := w.machines[r.ID]; ok && first != r.launchedAs {
			w.say("machine %s was launched twice: as process %v, then as %v", r.ID, first, r.launchedAs)
		}
		w.machines[r.ID] = r.launchedAs
		if !r.alive() {
			continue
		}
		if other, ok := writers[r.Volume]; ok {
			w.say("one-writer: machines %s and %s both run on volume %s", other, r.ID, r.Volume)
		}
		writers[r.Volume] = r.ID
	}
	// A pool that was put in another's place has a history of its own.
	pool := ""
	if info, err := os.Stat(filepath.Join(w.h.StateDir, "volumes", "pool.btrfs")); err == nil {
		if stat, ok := info.Sys().(*syscall.Stat_t); ok {
			pool = strconv.FormatUint(stat.Ino, 10)
		}
	}
	files, _ := filepath.Glob(filepath.Join(w.h.StateDir, "volumes", "pool", "volumes", "*", "writer.json"))
	for _, f := range files {
		var writer struct {
			Epoch uint64 `json:"epoch"`
		}
		if b, err := os.ReadFile(f); err != nil || json.Unmarshal(b, &writer) != nil {
			continue // deleted meanwhile
		}
		if seen := w.epochs[pool+f]; writer.Epoch < seen {
			w.say("the writer epoch in %s went from %d to %d", f, seen, writer.Epoch)
		}
		w.epochs[pool+f] = writer.Epoch
	}
}

// say fails the test, once for each finding.
func (w *witness) say(format string, args ...any) {
	if key := format + args[0].(string); !w.said[key] { //nolint:errcheck,forcetypeassert // the first is always an id
		w.said[key] = true
		w.tb.Errorf(format, args...)
	}
}

// records reads what the local provider keeps of its machines.
func (h *Host) records() []launchRecord {
	files, _ := filepath.Glob(filepath.Join(h.StateDir, "local", "machines", "*", "record.json"))
	var out []launchRecord
	for _, f := range files {
		var r launchRecord
		if b, err := os.ReadFile(f); err == nil && json.Unmarshal(b, &r) == nil {
			out = append(out, r)
		}
	}
	return out
}

// alive reports whether the machine's first process runs.
func (r launchRecord) alive() bool {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(r.PID), "stat"))
	if err != nil {
		return false
	}
	// Fields are counted from the end of the program's name: the state is the
	// first, the start time the twentieth (proc(5)).
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	return len(fields) > 19 && fields[0] != "Z" && fields[0] != "X" && fields[19] == strconv.FormatUint(r.StartTicks, 10)
}

// MachineInit returns the first process of a machine, or of any if the id is
// empty, once it is the machine agent, or 0. It costs less than [Host.Processes], for those who are in a
// hurry.
func (h *Host) MachineInit(machine string) int {
	for _, r := range h.records() {
		if machine != "" && r.ID != machine || !r.Started || !r.alive() {
			continue
		}
		line, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(r.PID), "cmdline"))
		argv0, _, _ := strings.Cut(string(line), "\x00")
		if err == nil && filepath.Base(argv0) == "depot-agent" {
			return r.PID
		}
	}
	return 0
}

// ChildOf returns the process below pid whose program has that name, or 0.
func ChildOf(pid int, program string) int {
	for _, child := range descendants(pid) {
		line, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(child), "cmdline"))
		argv0, _, _ := strings.Cut(string(line), "\x00")
		if err == nil && filepath.Base(argv0) == program {
			return child
		}
	}
	return 0
}

// FindProcess returns the process with exactly that command line, or 0.
func FindProcess(args ...string) int {
	want := strings.Join(args, "\x00") + "\x00"
	for _, pid := range pids() {
		if line, err := os.ReadFile(filepath.Join("/proc", pid, "cmdline")); err == nil && string(line) == want {
			n, _ := strconv.Atoi(pid)
			return n
		}
	}
	return 0
}
