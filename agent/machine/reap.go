package machine

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
)

// reaper does the duty of PID 1: it waits for orphans, that they do not stay
// as zombies. It leaves the children that it started itself to their
// [exec.Cmd].
type reaper struct {
	mu  sync.Mutex // held while a child is started, and while one is reaped
	own map[int]struct{}
}

// start starts cmd so that the reaper knows it before it can end.
func (r *reaper) start(cmd *exec.Cmd) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	if r.own == nil {
		r.own = map[int]struct{}{}
	}
	r.own[cmd.Process.Pid] = struct{}{}
	return nil
}

// run reaps until ctx ends. A process that is not PID 1 (nor a subreaper) has
// no orphans, and must not run it: it would take the children of others.
func (r *reaper) run(ctx context.Context) {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGCHLD)
	defer signal.Stop(ended)
	for {
		r.reap()
		select {
		case <-ctx.Done():
			return
		case <-ended:
		}
	}
}

// reap waits for every orphan that has ended. It stops at a child of its own,
// which its Cmd is about to wait for: the kernel shows one at a time. That is
// no loss, for the only one is buildkitd, and with it ends the machine.
func (r *reaper) reap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		pid := siginfoPID(&info)
		if _, own := r.own[pid]; err != nil || pid == 0 || own {
			return
		}
		_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
	}
}
