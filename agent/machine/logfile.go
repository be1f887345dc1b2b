package machine

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
)

// The bounds of a machine's log: at logBytes it is cut down to its first
// logHeadBytes, where the start and the first failure are, and its last
// logTailBytes, where the end is.
const (
	logBytes     = 8 << 20
	logHeadBytes = 1 << 20
	logTailBytes = 1 << 20
)

// BoundLog returns a writer to a machine's log that keeps it from filling the
// host's disk: the launcher keeps the file as long as the machine, however long
// it lives and however much buildkitd has to say. What is not a regular file
// (a pipe to a container engine, which bounds logs itself) is returned as is.
func BoundLog(w io.Writer) io.Writer {
	f, ok := w.(*os.File)
	if !ok {
		return w
	}
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return w
	}
	return &logFile{file: f, size: info.Size(), max: logBytes, head: logHeadBytes, tail: logTailBytes}
}

// logFile is a log that loses its middle when it grows too long.
type logFile struct {
	file            *os.File
	max, head, tail int64 // bytes

	mu   sync.Mutex // guards size, and keeps lines whole
	size int64
}

func (l *logFile) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size+int64(len(p)) > l.max {
		if err := l.cut(); err != nil {
			return 0, fmt.Errorf("shorten the log: %w", err)
		}
	}
	n, err := l.file.Write(p)
	l.size += int64(n)
	return n, err
}

// cut drops the middle of the file, whole lines of it.
func (l *logFile) cut() error {
	// The launcher may have opened the file for writing only; opened anew by its
	// descriptor, it is found from within any root filesystem.
	r, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", l.file.Fd()))
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // it was only read
	info, err := r.Stat()
	if err != nil {
		return err
	}
	size := info.Size() // a crash's trace goes there by another way
	if size <= l.head+l.tail {
		l.size = 0 // one huge line: it goes past the bound, once
		return nil
	}
	head, tail := make([]byte, l.head), make([]byte, l.tail)
	_, headErr := r.ReadAt(head, 0)
	_, tailErr := r.ReadAt(tail, size-l.tail)
	if err := errors.Join(headErr, tailErr); err != nil {
		return err
	}
	head = head[:bytes.LastIndexByte(head, '\n')+1]
	tail = tail[bytes.IndexByte(tail, '\n')+1:]
	if err := l.file.Truncate(int64(len(head))); err != nil {
		return err
	}
	if _, err := l.file.Seek(0, io.SeekEnd); err != nil {
		return err
	}
	n, err := fmt.Fprintf(l.file, "… the log grew too long: what stood here was dropped …\n%s", tail)
	l.size = int64(len(head)) + int64(n)
	return err
}
