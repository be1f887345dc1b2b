package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// logTail is how much of a log a failed start shows, in bytes.
const logTail = 2048

// daemon is a program that outlives the command that started it. Its pid file
// holds the process's start time as well, so that another process that got the
// same pid is never taken for it.
type daemon struct {
	name    string // for messages
	pidFile string
	logFile string
	logMode fs.FileMode
}

// record is a pid file.
type record struct {
	PID int `json:"pid"`
	// Started is the process's start in clock ticks since boot, field 22 of
	// /proc/<pid>/stat (proc(5)); Boot is the boot's id.
	Started uint64 `json:"started"`
	Boot    string `json:"boot"`
}

// running returns the daemon's process, or nil. The caller closes it.
func (d daemon) running() (*process, error) {
	text, err := os.ReadFile(d.pidFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil //nolint:nilnil // no process is an answer
	}
	if err != nil {
		return nil, err
	}
	var r record
	if err := json.Unmarshal(text, &r); err != nil || r.PID <= 1 {
		return nil, fmt.Errorf("%s is damaged: look for the %s yourself, end it, and remove the file", d.pidFile, d.name)
	}
	// The descriptor is opened first: what is true of the process then stays
	// true of the descriptor.
	fd, err := unix.PidfdOpen(r.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, nil //nolint:nilnil // no process is an answer
	}
	if err != nil {
		return nil, fmt.Errorf("look at process %d of the %s: %w", r.PID, d.name, err)
	}
	p := &process{pid: r.PID, fd: fd}
	now, err := recordOf(r.PID)
	if err != nil || now != r || p.ended() {
		return nil, p.close() // a process that cannot be read has ended
	}
	return p, nil
}

// recordOf describes a live process.
func recordOf(pid int) (record, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return record{}, err
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return record{}, err
	}
	// The second field is the program's name in brackets, and may hold both.
	_, rest, _ := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')')+1:]), " ")
	const startTime = 22 - 3 // rest begins with the third field
	fields := strings.Fields(rest)
	if len(fields) <= startTime {
		return record{}, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	started, err := strconv.ParseUint(fields[startTime], 10, 64)
	return record{PID: pid, Started: started, Boot: strings.TrimSpace(string(boot))}, err
}

// start runs cmd in a session of its own, with its output in the log file, and
// waits until ready says so. If it ends before, the error has the end of its
// log.
func (d daemon) start(ctx context.Context, cmd *exec.Cmd, ready func(context.Context) error) error {
	log, err := os.OpenFile(d.logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, d.logMode)
	if err != nil {
		return err
	}
	defer log.Close() //nolint:errcheck // the daemon has its own descriptor
	begin, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	cmd.Stdout, cmd.Stderr = log, log
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setsid = true
	cmd.Dir = "/"
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the %s: %w", d.name, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the daemon, or with this program
	if err := d.remember(cmd.Process.Pid); err != nil {
		return errors.Join(err, cmd.Process.Kill())
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	readiness := make(chan error, 1)
	go func() { readiness <- ready(ctx) }()
	select {
	case err = <-readiness:
		if err == nil {
			return nil
		}
		err = fmt.Errorf("the %s was started but is not ready: %w", d.name, err)
	case end := <-ended:
		cancel(errors.New("it has ended"))
		<-readiness
		err = fmt.Errorf("the %s ended at its start: %w", d.name, errors.Join(end, os.Remove(d.pidFile)))
	}
	return fmt.Errorf("%w. The end of its log, %s:\n%s", err, d.logFile, tail(d.logFile, begin))
}

// remember writes the pid file.
func (d daemon) remember(pid int) error {
	r, err := recordOf(pid)
	if err != nil {
		return err
	}
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	tmp := d.pidFile + ".new"
	if err := os.WriteFile(tmp, append(text, '\n'), 0o644); err != nil { //nolint:gosec // any user may ask for the status
		return err
	}
	return os.Rename(tmp, d.pidFile)
}

// stop asks the daemon to end, ends it after the timeout, and removes the pid
// file. It reports whether there was one.
func (d daemon) stop(ctx context.Context, timeout time.Duration) (bool, error) {
	p, err := d.running()
	if err != nil {
		return false, err
	}
	if p == nil {
		return false, ignoreMissing(os.Remove(d.pidFile))
	}
	defer p.close() //nolint:errcheck // a descriptor of ours
	if err := p.signal(unix.SIGTERM); err != nil {
		return true, err
	}
	asked, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if p.wait(asked) != nil {
		if ctx.Err() != nil {
			return true, fmt.Errorf("the %s (process %d) was asked to end and still runs: %w", d.name, p.pid, context.Cause(ctx))
		}
		if err := p.signal(unix.SIGKILL); err != nil {
			return true, err
		}
		if err := p.wait(ctx); err != nil {
			return true, fmt.Errorf("the %s (process %d) does not end: %w", d.name, p.pid, err)
		}
	}
	return true, ignoreMissing(os.Remove(d.pidFile))
}

// process is a process by a descriptor, which never comes to mean another one.
type process struct{ pid, fd int }

func (p *process) close() error { return unix.Close(p.fd) }

func (p *process) signal(s unix.Signal) error {
	err := unix.PidfdSendSignal(p.fd, s, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// ended reports whether the process has ended, reaped or not.
func (p *process) ended() bool {
	fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}} //nolint:gosec // a descriptor is a small number
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}

// wait returns when the process has ended, or with ctx's error.
func (p *process) wait(ctx context.Context) error {
	const slice = 100 // milliseconds between looks at ctx
	for {
		fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}} //nolint:gosec // a descriptor is a small number
		n, err := unix.Poll(fds, slice)
		switch {
		case err == nil && n > 0:
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		}
	}
}

// tail returns what was written to a log since begin, cut to its end.
func tail(path string, begin int64) string {
	f, err := os.Open(path) //nolint:gosec // the daemon's own log
	if err != nil {
		return err.Error()
	}
	defer f.Close() //nolint:errcheck // it was only read
	if size, err := f.Seek(0, io.SeekEnd); err == nil {
		begin = max(begin, size-logTail)
	}
	if _, err := f.Seek(begin, io.SeekStart); err != nil {
		return err.Error()
	}
	text, err := io.ReadAll(f)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(text))
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// mkdirFor makes a directory for a user.
func mkdirFor(dir string, mode fs.FileMode, uid, gid int) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil { //nolint:gosec // the daemon's user has to pass
		return err
	}
	if err := os.Mkdir(dir, mode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return errors.Join(os.Chown(dir, uid, gid), os.Chmod(dir, mode))
}
