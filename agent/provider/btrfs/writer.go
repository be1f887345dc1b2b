package btrfs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/agent/provider"
)

// writer is writer.json: who may write the volume, or did last.
type writer struct {
	Epoch   uint64 `json:"epoch"`
	Machine string `json:"machine"`
}

// Writer is the right to write one volume.
type Writer struct {
	lock *os.File
	path string
}

// Open locks the volume for the machine and records its epoch durably.
//
// provider.ErrVolumeBusy: another machine holds it (the message names it).
// provider.ErrStaleWriter: a higher epoch wrote it, or this one in the name of
// another machine. provider.ErrNotFound: Ensure has not made it.
func (s *Store) Open(ctx context.Context, volume, machine string, epoch uint64) (*Writer, error) {
	if err := s.check(ctx, volume, machine); err != nil {
		return nil, fmt.Errorf("open volume: %w", err)
	}
	lock, err := s.lock(volume)
	if err != nil {
		return nil, fmt.Errorf("open volume %s for machine %s: %w", volume, machine, err)
	}
	if err := s.admit(volume, writer{Epoch: epoch, Machine: machine}); err != nil {
		return nil, errors.Join(fmt.Errorf("open volume %s for machine %s: %w", volume, machine, err), closeUnforked(lock))
	}
	return &Writer{lock: lock, path: s.path(volume, "live")}, nil
}

// admit fences off stale writers. The caller holds the volume's lock.
func (s *Store) admit(volume string, next writer) error {
	last, err := s.lastWriter(volume)
	if err != nil || last == next {
		return err
	}
	if err := last.admits(next); err != nil {
		return err
	}
	return writeJSON(s.path(volume, "writer.json"), next)
}

// admits says whether next may write after w did.
func (w writer) admits(next writer) error {
	switch {
	case next.Epoch < w.Epoch:
		return fmt.Errorf("%w: epoch %d is below %d, of machine %s: the order comes from a control plane that was restored or replaced",
			provider.ErrStaleWriter, next.Epoch, w.Epoch, w.Machine)
	case next.Epoch == w.Epoch && w.Machine != "" && w.Machine != next.Machine:
		return fmt.Errorf("%w: epoch %d belongs to machine %s", provider.ErrStaleWriter, next.Epoch, w.Machine)
	}
	return nil
}

// lastWriter returns the zero writer for a volume that was never written.
func (s *Store) lastWriter(volume string) (writer, error) {
	var last writer
	err := readJSON(s.path(volume, "writer.json"), &last)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return last, err
}

// Path is the live tree.
func (w *Writer) Path() string { return w.path }

// LockFile is the locked file. Whoever inherits its description, as a process
// or over a socket, keeps the volume locked until the last copy is closed.
func (w *Writer) LockFile() *os.File { return w.lock }

// Close gives up this process's copy of the lock, and so the volume if nobody
// inherited it.
func (w *Writer) Close() error { return closeUnforked(w.lock) }

// closeUnforked closes f when no process is between its fork and its exec, and
// so holds a copy of f that would keep a lock or a mount for another moment.
func closeUnforked(f *os.File) error {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	return f.Close()
}

// lock takes the volume's lock, without waiting.
func (s *Store) lock(volume string) (*os.File, error) {
	path := s.path(volume, "lock")
	f, err := os.OpenFile(path, os.O_RDWR, 0) //nolint:gosec // G304: the id in the path was checked
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("volume %s: %w", volume, provider.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	if err := s.take(f, volume); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (s *Store) take(f *os.File, volume string) error {
	err := provider.Lock(func() error {
		return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart})
	})
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		last, err := s.lastWriter(volume)
		if err != nil {
			return err
		}
		return fmt.Errorf("%w: %s holds it", provider.ErrVolumeBusy, cmp.Or(last.Machine, "another operation"))
	}
	if err != nil {
		return &os.PathError{Op: "lock", Path: f.Name(), Err: err}
	}
	// Deleted, perhaps made anew, while it was opened: this lock guards nothing.
	ours, err := f.Stat()
	if err != nil {
		return err
	}
	current, err := os.Stat(f.Name())
	if errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(ours, current) {
		return fmt.Errorf("volume %s: %w", volume, provider.ErrNotFound)
	}
	return err
}

// lockHeld tells whether somebody holds the lock at path. It does not take it,
// so it never gets in the way of an Open.
func lockHeld(path string) (bool, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0) //nolint:gosec // G304: the id in the path was checked
	if err != nil {
		return false, err
	}
	defer func() { _ = f.Close() }()
	probe := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &probe); err != nil {
		return false, &os.PathError{Op: "probe lock", Path: path, Err: err}
	}
	return probe.Type != unix.F_UNLCK, nil
}
