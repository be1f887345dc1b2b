package local

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// hierarchy writes files as the kernel would show them below /sys/fs/cgroup.
func hierarchy(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for path, content := range files {
		path = filepath.Join(root, path)
		must(t, os.MkdirAll(filepath.Dir(path), 0o700))
		must(t, os.WriteFile(path, []byte(content), 0o600))
	}
	return root
}

func TestHierarchies(t *testing.T) {
	for name, test := range map[string]struct {
		files map[string]string
		want  []string
	}{
		"version 2": {
			map[string]string{"cgroup.controllers": "cpu memory\n", "system.slice/cgroup.procs": "", "depot_a/cgroup.procs": ""},
			[]string{"."},
		},
		"version 1 and hybrid": {
			map[string]string{"memory/cgroup.procs": "1\n", "cpu,cpuacct/cgroup.procs": "1\n", "unified/cgroup.controllers": ""},
			[]string{".", "cpu,cpuacct", "memory", "unified"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			root := hierarchy(t, test.files)
			roots, err := hierarchies(root)
			must(t, err)
			var got []string
			for _, r := range roots {
				rel, err := filepath.Rel(root, r)
				must(t, err)
				got = append(got, rel)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestOutOfMemory(t *testing.T) {
	const path = "/depot_a/machine_b"
	for name, test := range map[string]struct {
		files map[string]string
		want  bool
	}{
		"version 2":                 {map[string]string{"init/memory.events.local": "oom 0\noom_kill 2\n"}, true},
		"version 2, not yet moved":  {map[string]string{"memory.events.local": "oom 1\noom_kill 1\n"}, true},
		"version 2, a RUN step's":   {map[string]string{"memory.events": "oom_kill 1\n", "memory.events.local": "oom_kill 0\n", "init/memory.events.local": "oom_kill 0\n"}, false},
		"version 1":                 {map[string]string{"v1": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"}, true},
		"version 1, a RUN step's":   {map[string]string{"v1": "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n"}, false},
		"the cgroup is not there":   {nil, false},
		"a kernel without the file": {map[string]string{"cgroup.procs": ""}, false},
	} {
		t.Run(name, func(t *testing.T) {
			files := map[string]string{}
			for file, content := range test.files {
				if file == "v1" {
					files["memory"+path+"/memory.oom_control"] = content
					continue
				}
				files[strings.TrimPrefix(path, "/")+"/"+file] = content
			}
			if got := outOfMemory(hierarchy(t, files), path); got != test.want {
				t.Errorf("got %t, want %t", got, test.want)
			}
		})
	}
}
