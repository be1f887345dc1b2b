package local

import (
	"bufio"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// loader finds the shared libraries of programs as the host's dynamic loader
// would, so that a program can be copied together with what it needs.
type loader struct{ dirs []string }

// hostLoader searches the directories of ld.so.conf and the usual ones.
func hostLoader() loader {
	dirs := confDirs("/etc/ld.so.conf", 0)
	for _, base := range []string{"/lib", "/usr/lib", "/lib64", "/usr/lib64"} {
		multiarch, err := filepath.Glob(base + "/*-linux-*")
		if err == nil {
			dirs = append(dirs, multiarch...)
		}
		dirs = append(dirs, base)
	}
	return loader{dirs}
}

// closure returns the loader and all libraries that the program needs, as paths
// by which the loader finds them; none for a static program or a script.
func (l loader) closure(program string) ([]string, error) {
	var found []string
	todo := []string{program}
	for len(todo) > 0 {
		path := todo[0]
		todo = todo[1:]
		needs, err := l.needs(path)
		if err != nil {
			return nil, fmt.Errorf("libraries of %s: %w", program, err)
		}
		for _, n := range needs {
			if !slices.Contains(found, n) {
				found = append(found, n)
				todo = append(todo, n)
			}
		}
	}
	return found, nil
}

// needs returns the direct needs of one file.
func (l loader) needs(path string) (paths []string, err error) {
	f, err := elf.Open(path)
	if format := (*elf.FormatError)(nil); errors.As(err, &format) {
		return nil, nil // a script
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()

	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return nil, fmt.Errorf("read the loader's name in %s: %w", path, err)
		}
		paths = append(paths, strings.TrimRight(string(b), "\x00"))
	}
	libraries, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	own, err := runPaths(f, path)
	if err != nil {
		return nil, err
	}
	for _, name := range libraries {
		p, err := l.find(name, own, f)
		if err != nil {
			return nil, err
		}
		paths = append(paths, p)
	}
	return paths, nil
}

func (l loader) find(name string, own []string, for_ *elf.File) (string, error) {
	for _, dir := range slices.Concat(own, l.dirs) {
		p := filepath.Join(dir, name)
		f, err := elf.Open(p)
		if err != nil {
			continue
		}
		fits := f.Machine == for_.Machine && f.Class == for_.Class
		if err := f.Close(); err != nil {
			return "", err
		}
		if fits {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is nowhere in %s", name, strings.Join(l.dirs, ":"))
}

// runPaths are the directories that a file asks for itself.
func runPaths(f *elf.File, path string) ([]string, error) {
	var dirs []string
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		values, err := f.DynString(tag)
		if err != nil {
			return nil, err
		}
		for _, v := range values {
			for dir := range strings.SplitSeq(v, ":") {
				origin := filepath.Dir(path)
				dirs = append(dirs, strings.NewReplacer("$ORIGIN", origin, "${ORIGIN}", origin).Replace(dir))
			}
		}
	}
	return dirs, nil
}

// confDirs reads ld.so.conf and what it includes. What cannot be read is left
// out: a library that is then not found is reported by name.
func confDirs(path string, depth int) []string {
	f, err := os.Open(path) //nolint:gosec // G304: the host's own configuration
	if err != nil || depth > 8 {
		return nil
	}
	defer f.Close() //nolint:errcheck // it was only read
	var dirs []string
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		fields := strings.Fields(line)
		switch {
		case len(fields) == 2 && fields[0] == "include":
			pattern := fields[1]
			if !filepath.IsAbs(pattern) {
				pattern = filepath.Join(filepath.Dir(path), pattern)
			}
			included, err := filepath.Glob(pattern)
			if err != nil {
				continue
			}
			for _, p := range included {
				dirs = append(dirs, confDirs(p, depth+1)...)
			}
		case len(fields) == 1:
			dirs = append(dirs, fields[0])
		}
	}
	return dirs
}
