package ca_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/opendepot/depot/controlplane/ca"
)

func TestLoadMasterKey(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path, data := filepath.Join(dir, "etc", "master.key"), filepath.Join(dir, "data")
	var mu sync.Mutex
	var keys [][]byte
	var wg sync.WaitGroup
	for range 8 { // first starts at once agree on one key
		wg.Go(func() {
			key, err := ca.LoadMasterKey(path, data)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			keys = append(keys, key)
		})
	}
	wg.Wait()
	for _, key := range keys {
		if len(key) != 32 || !bytes.Equal(key, keys[0]) || bytes.Equal(key, make([]byte, 32)) {
			t.Fatalf("got keys of %d bytes that differ or are empty", len(key))
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("got mode %v and error %v, want 0600", info.Mode(), err)
	}
	files, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(files) != 1 {
		t.Errorf("%d files are left beside the key (error %v)", len(files)-1, err)
	}
	if _, err := os.Stat(data); err == nil {
		t.Error("the data directory was made")
	}
}

func TestLoadMasterKeyRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	data := filepath.Join(dir, "data")
	if err := os.MkdirAll(filepath.Join(data, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(data, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil { // whatever the umask
			t.Fatal(err)
		}
		return path
	}
	digits := strings.Repeat("ab", 32)
	tests := map[string]struct{ path, mention string }{
		"in the data directory": {filepath.Join(data, "master.key"), "inside the data directory"},
		"deep in it":            {filepath.Join(data, "sub", "new", "master.key"), "inside the data directory"},
		"in it, by a link":      {filepath.Join(dir, "link", "master.key"), "inside the data directory"},
		"in it, by dots":        {filepath.Join(dir, "other", "..", "data", "master.key"), "inside the data directory"},
		"readable by the group": {write("group", digits, 0o640), "chmod 600"},
		"readable by others":    {write("others", digits, 0o604), "chmod 600"},
		"short":                 {write("short", digits[2:], 0o600), "64 hexadecimal digits"},
		"long":                  {write("long", strings.Repeat(digits, 40), 0o600), "64 hexadecimal digits"},
		"empty":                 {write("empty", "", 0o600), "64 hexadecimal digits"},
		"no digits":             {write("text", strings.Repeat("xy", 32), 0o600), "64 hexadecimal digits"},
		"a directory":           {dir, "not a regular file"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			key, err := ca.LoadMasterKey(test.path, data)
			if err == nil || !strings.Contains(err.Error(), test.mention) || !strings.Contains(err.Error(), test.path) {
				t.Errorf("got error %v, want one that names the file and says %q", err, test.mention)
			}
			if key != nil || err != nil && strings.Contains(err.Error(), digits[:16]) {
				t.Error("a refused key is shown")
			}
		})
	}
	beside := write("data-key", digits+"\n", 0o600) // a name that starts alike is not inside
	if key, err := ca.LoadMasterKey(beside, data); err != nil || !bytes.Equal(key, bytes.Repeat([]byte{0xab}, 32)) {
		t.Errorf("got %x and error %v", key, err)
	}
	entries, err := os.ReadDir(filepath.Join(data, "sub"))
	if err != nil || len(entries) > 0 {
		t.Errorf("a refusal left %d files behind (error %v)", len(entries), err)
	}
}
