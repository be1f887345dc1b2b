package local

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A process whose first thread is a zombie still runs: its other threads hold
// its descriptors.
func TestRunningWithoutFirstThread(t *testing.T) {
	self, err := os.Executable()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), standin(self), "headless") //nolint:gosec // G204: the tests' own program
	stdin, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	p, err := find(cmd.Process.Pid)
	must(t, err)
	eventually(t, "the first thread is a zombie", func() bool {
		return strings.Contains(contents(t, "/proc/"+strconv.Itoa(p.pid)+"/stat"), ") Z ")
	})
	if !p.running() {
		t.Error("it runs, and is taken for ended")
	}
	must(t, stdin.Close())
	eventually(t, "it has ended", func() bool { return !p.running() })
	must(t, cmd.Wait())
	if err := p.signal(unix.SIGTERM); err == nil {
		t.Error("a process that was reaped took a signal")
	}
	must(t, p.kill(t.Context()))
	if (process{p.pid, p.start + 1}).running() || (process{os.Getpid(), 1}).running() {
		t.Error("another process of the same number is taken for it")
	}
}
