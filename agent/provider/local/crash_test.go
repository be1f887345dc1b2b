package local

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opendepot/depot/agent/provider/btrfs"
)

// agentToKill is what an agent does between two moments at which it says so, so
// that a test can kill it in between: launch a machine, and destroy it.
func agentToKill(base string) {
	ctx := context.Background()
	store, err := btrfs.Open(ctx, btrfs.Config{Dir: filepath.Join(base, "volumes"), PoolBytes: 1 << 30})
	tell("store", err)
	p, err := Open(ctx, Config{
		State: filepath.Join(base, "state"), Run: filepath.Join(base, "run"), Binaries: filepath.Join(base, "bin"), Relay: filepath.Join(base, "relay"),
		OpenVolume: Volumes(store.Open), Advertise: hostAddr, FirstPort: 40000, LastPort: 40010,
		Nameservers: []netip.Addr{netip.MustParseAddr(serverAddr)}, Log: slog.New(slog.DiscardHandler),
	})
	tell("launching", err)
	_, err = p.Launch(ctx, specA())
	tell("destroying", err)
	tell("done", p.Destroy(ctx, machineA))
}

func tell(moment string, err error) {
	if err != nil {
		panic(err)
	}
	if _, err := fmt.Fprintln(os.Stdout, moment); err != nil {
		panic(err)
	}
}

// TestKilledAgent kills the agent at random moments of a launch and of a
// destroy; after each, the next agent can launch the same machine, and nothing
// is left once it destroyed it.
func TestKilledAgent(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // G404: this is a test's dice
	r := newRig(t)
	must(t, r.Close(t.Context()))
	for range 5 {
		for moment, within := range map[string]time.Duration{"launching": 250 * time.Millisecond, "destroying": 150 * time.Millisecond} {
			delay := time.Duration(random.Int64N(int64(within)))
			r.killAgent(t, moment, delay)
			r.open(t)
			if list, err := r.List(t.Context()); err != nil || len(list) > 1 {
				t.Fatalf("%s +%v: listed %+v, %v", moment, delay, list, err)
			}
			i, err := r.Launch(t.Context(), specA())
			if err != nil {
				t.Fatalf("%s +%v: launch again: %v", moment, delay, err)
			}
			if i.Exit == nil { // it may have been ended by the destroy, and not yet removed
				if got := greeting(t, i.Address); got != "hello" {
					t.Errorf("%s +%v: at the door: %q", moment, delay, got)
				}
			}
			must(t, r.Destroy(t.Context(), machineA))
			r.noTrace(t)
			must(t, r.Close(t.Context()))
			if t.Failed() {
				t.Fatalf("agent killed %v after %s", delay, moment)
			}
		}
	}
	r.open(t)
}

// killAgent runs an agent and kills it the given time after the given moment.
func (r *rig) killAgent(t *testing.T, moment string, after time.Duration) {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), self, "agent", filepath.Dir(r.config.State)) //nolint:gosec // G204: this very program
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	said := bufio.NewScanner(stdout)
	for said.Scan() && said.Text() != moment {
		continue
	}
	if said.Text() != moment {
		t.Fatalf("the agent ended early: %v\n%s", cmd.Wait(), stderr.String())
	}
	select {
	case <-time.After(after): // the moment that the dice chose, not a wait for something
	case <-t.Context().Done():
	}
	must(t, cmd.Process.Kill())
	_, err = io.Copy(io.Discard, stdout)
	must(t, err)
	if err := cmd.Wait(); err == nil {
		t.Logf("the agent was done before it could be killed, %v after %s", after, moment)
	}
}
