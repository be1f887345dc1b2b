package machine

import (
	"bytes"
	"io"
	"strings"
	"sync"
)

// tailBytes is how much of buildkitd's log is kept for the reason of its end.
const tailBytes = 2 << 10

// tail passes a log on and keeps its last lines.
type tail struct {
	out io.Writer

	mu   sync.Mutex // guards last
	last []byte
}

// Write never fails: a log that cannot be written ends no build.
func (t *tail) Write(p []byte) (int, error) {
	_, _ = t.out.Write(p)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = append(t.last, p...)
	if over := len(t.last) - tailBytes; over > 0 {
		t.last = append(t.last[:0], t.last[over:]...)
	}
	return len(p), nil
}

// String returns the last lines, whole ones only, as one.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	last := t.last
	if len(last) == tailBytes {
		if _, whole, ok := bytes.Cut(last, []byte("\n")); ok {
			last = whole
		}
	}
	if text := strings.TrimSpace(string(last)); text != "" {
		return strings.ToValidUTF8(strings.ReplaceAll(text, "\n", " | "), "?")
	}
	return "none"
}
