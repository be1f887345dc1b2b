package machine

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// cgroupFiles writes a hierarchy as the kernel would show it.
func cgroupFiles(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for path, content := range files {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestDivide(t *testing.T) {
	for name, test := range map[string]struct {
		files, want map[string]string
	}{
		"version 2": {
			files: map[string]string{"cgroup.controllers": "memory\n", "cgroup.procs": "1\n", "memory.max": "8589934592\n"},
			want: map[string]string{
				"init/cgroup.procs": "1", "cgroup.subtree_control": "+memory", "buildkit/memory.max": "8321499136",
			},
		},
		"version 2, a small machine": {
			files: map[string]string{"cgroup.controllers": "memory\n", "cgroup.procs": "", "memory.max": "1073741824\n"},
			want:  map[string]string{"buildkit/memory.max": "939524096"},
		},
		"version 2, no limit": {
			files: map[string]string{"cgroup.controllers": "", "cgroup.procs": "7\n", "memory.max": "max\n"},
			want:  map[string]string{"init/cgroup.procs": "7", "cgroup.subtree_control": "", "buildkit/memory.max": ""},
		},
		"version 1": {
			files: map[string]string{"memory/memory.limit_in_bytes": "1073741824\n"},
			want:  map[string]string{"memory/buildkit/memory.limit_in_bytes": "939524096", "init/cgroup.procs": ""},
		},
		"version 1, no limit": {
			files: map[string]string{"memory/memory.limit_in_bytes": "9223372036854771712\n"},
			want:  map[string]string{"memory/buildkit/memory.limit_in_bytes": ""},
		},
		"none": {},
	} {
		t.Run(name, func(t *testing.T) {
			root := cgroupFiles(t, test.files)
			if err := divide(root); err != nil {
				t.Fatal(err)
			}
			for path, want := range test.want {
				got, err := os.ReadFile(filepath.Join(root, path)) //nolint:gosec // G304: in t.TempDir()
				if err != nil && !os.IsNotExist(err) {
					t.Fatal(err)
				}
				if string(got) != want {
					t.Errorf("%s is %q, want %q", path, got, want)
				}
			}
		})
	}
}

func TestOwnCgroup(t *testing.T) {
	for name, test := range map[string]struct {
		self string
		want bool
	}{
		"version 2":                 {"0::/\n", true},
		"version 2, the host's":     {"0::/docker/9a\n", false},
		"version 2, of a unit":      {"0::/system.slice/depot.service\n", false},
		"both":                      {"3:cpu,cpuacct:/\n1:name=systemd:/\n0::/\n", true},
		"both, the host's memory":   {"3:memory:/docker/9a\n0::/\n", false},
		"version 1":                 {"3:memory:/\n", true},
		"a kernel without cgroups":  {"", false},
		"outside of the namespace":  {"0::/../other\n", false},
		"a path that holds a colon": {"0::/a:/\n", false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := ownCgroup(test.self); got != test.want {
				t.Errorf("got %t, want %t", got, test.want)
			}
		})
	}
}

func TestOutOfMemory(t *testing.T) {
	for name, test := range map[string]struct {
		files map[string]string
		want  bool
	}{
		"version 2":                {map[string]string{"init/memory.events.local": "oom 1\noom_kill 1\n"}, true},
		"version 2, of a RUN step": {map[string]string{"init/memory.events.local": "oom 0\noom_kill 0\n", "memory.events": "oom_kill 1\n"}, false},
		"version 1":                {map[string]string{"memory/memory.oom_control": "under_oom 0\noom_kill 1\n"}, true},
		"version 1, none":          {map[string]string{"memory/memory.oom_control": "under_oom 0\noom_kill 0\n"}, false},
		"nothing to read":          {nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := outOfMemory(cgroupFiles(t, test.files)); got != test.want {
				t.Errorf("got %t, want %t", got, test.want)
			}
		})
	}
}

// TestLogIsBounded writes much more than is kept, to a file opened as a
// launcher opens it.
func TestLogIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "machine.log")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600) //nolint:gosec // G304: in t.TempDir()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // the test reads it by its name
	l := &logFile{file: f, max: 1000, head: 100, tail: 200}
	const lines = 5000
	for i := range lines {
		if _, err := fmt.Fprintf(l, "line %d\n", i); err != nil {
			t.Fatal(err)
		}
		if info, err := f.Stat(); err != nil || info.Size() > l.max {
			t.Fatalf("after line %d the log has %d bytes, %v", i, info.Size(), err)
		}
	}
	log, err := os.ReadFile(path) //nolint:gosec // G304: in t.TempDir()
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Split(strings.TrimSpace(string(log)), "\n")
	var marks []int
	for i, line := range got {
		if strings.HasPrefix(line, "…") {
			marks = append(marks, i)
		} else if n := 0; !scanned(line, &n) {
			t.Errorf("line %d is not whole: %q", i, line)
		}
	}
	if len(marks) != 1 {
		t.Errorf("the gap is marked %d times, want once:\n%s", len(marks), log)
	}
	if got[0] != "line 0" || got[len(got)-1] != fmt.Sprintf("line %d", lines-1) {
		t.Errorf("first or last line is lost: %q, %q", got[0], got[len(got)-1])
	}
}

func scanned(line string, n *int) bool {
	_, err := fmt.Sscanf(line, "line %d", n)
	return err == nil && line == fmt.Sprintf("line %d", *n)
}

func TestBoundLog(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close() //nolint:errcheck // nothing was written
	defer w.Close() //nolint:errcheck // nothing was written
	for name, same := range map[string]io.Writer{"a pipe": w, "memory": &bytes.Buffer{}} {
		t.Run(name, func(t *testing.T) {
			if got := BoundLog(same); got != same {
				t.Errorf("got %T, want it as it is", got)
			}
		})
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // nothing was written
	if _, err := f.WriteString("before\n"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(int64(7), BoundLog(f).(*logFile).size); diff != "" { //nolint:forcetypeassert,errcheck // else the test fails
		t.Error(diff)
	}
}
