package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// process is a process of the host, told apart from a later one of the same
// number by the time it started, in clock ticks since boot.
type process struct {
	pid   int
	start uint64
}

// find looks up the process that has this number now.
func find(pid int) (process, error) {
	start, err := startTicks(pid)
	return process{pid, start}, err
}

// running reports whether any of the process still runs. Its state in /proc
// would not do: that is of its first thread, and others may still hold
// descriptors, such as a volume's lock, when that one is a zombie already. The
// init of a process namespace has ended when all others in it have.
func (p process) running() bool {
	fd, err := p.open()
	if err != nil {
		return !errors.Is(err, os.ErrProcessDone) // in doubt it runs
	}
	defer unix.Close(fd) //nolint:errcheck // a descriptor of a process has nothing to flush
	done, err := ended(fd, 0)
	return err != nil || !done
}

// open returns a descriptor of the process, os.ErrProcessDone if there is no
// such process any more.
func (p process) open() (int, error) {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, os.ErrProcessDone
	}
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", p.pid, err)
	}
	// Looked at after opening, so it is that very process or none.
	if start, err := startTicks(p.pid); err != nil || start != p.start {
		return -1, errors.Join(os.ErrProcessDone, unix.Close(fd))
	}
	return fd, nil
}

// ended waits for the end of all threads of a process.
func ended(fd int, wait time.Duration) (bool, error) {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(wait.Milliseconds())) //nolint:gosec // G115: descriptors are small
	if errors.Is(err, unix.EINTR) {
		err = nil
	}
	return n > 0, err
}

// signal returns os.ErrProcessDone if the process has ended.
func (p process) signal(sig unix.Signal) error {
	fd, err := p.open()
	if err != nil {
		return err
	}
	err = unix.PidfdSendSignal(fd, sig, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		err = os.ErrProcessDone
	}
	return errors.Join(err, unix.Close(fd))
}

// kill ends the process and returns when it has.
func (p process) kill(ctx context.Context) error {
	fd, err := p.open()
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd) //nolint:errcheck // a descriptor of a process has nothing to flush
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.pid, err)
	}
	const notice = 50 * time.Millisecond // at most, of ctx
	for {
		done, err := ended(fd, notice)
		if err != nil {
			return fmt.Errorf("wait for process %d: %w", p.pid, err)
		}
		if done {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("process %d was killed but has not ended, its disk may hang: %w", p.pid, ctx.Err())
		}
	}
}

// startTicks reads the start time from /proc/pid/stat; see proc(5).
func startTicks(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, fmt.Errorf("look at process %d: %w", pid, err)
	}
	// The name, in parentheses, may hold anything; fields are counted after it.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("look at process %d: cannot read when it started", pid)
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}
