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
	_, start, err := stat(pid)
	return process{pid, start}, err
}

// running reports whether the process still runs. A zombie does not: the init
// of a process namespace becomes one only when all others in it are gone.
func (p process) running() bool {
	state, start, err := stat(p.pid)
	return err == nil && start == p.start && state != 'Z' && state != 'X'
}

// open returns a descriptor of the process, os.ErrProcessDone if it has ended.
func (p process) open() (int, error) {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, os.ErrProcessDone
	}
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", p.pid, err)
	}
	if !p.running() { // looked at after opening, so it is that very process or none
		return -1, errors.Join(os.ErrProcessDone, unix.Close(fd))
	}
	return fd, nil
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
	for {
		// A descriptor of a process is readable once it has ended. The short
		// timeout only serves ctx.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int((50 * time.Millisecond).Milliseconds())) //nolint:gosec // G115: descriptors are small
		switch {
		case n > 0:
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("wait for process %d: %w", p.pid, err)
		case ctx.Err() != nil:
			return fmt.Errorf("process %d was killed but has not ended, its disk may hang: %w", p.pid, ctx.Err())
		}
	}
}

// stat reads the state and start time from /proc/pid/stat; see proc(5).
func stat(pid int) (state byte, start uint64, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, fmt.Errorf("look at process %d: %w", pid, err)
	}
	// The name, in parentheses, may hold anything; fields are counted after it.
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 {
		return 0, 0, fmt.Errorf("look at process %d: cannot read its state", pid)
	}
	start, err = strconv.ParseUint(string(fields[19]), 10, 64)
	return fields[0][0], start, err
}
