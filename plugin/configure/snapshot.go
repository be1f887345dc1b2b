package configure

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
)

// absent is the state of a path where nothing is.
const absent = "absent"

// snapshot is what was at a path before the first change, and what the change
// left there.
type snapshot struct {
	// Path is absolute.
	Path string `json:"path"`
	// Before is the state as [stateOf] gives it; Ours are the states that
	// installing left or was about to leave.
	Before string   `json:"before"`
	Ours   []string `json:"ours,omitempty"`
	// Mode, UID and GID are those of the file that was there.
	Mode fs.FileMode `json:"mode,omitempty"`
	UID  int         `json:"uid,omitempty"`
	GID  int         `json:"gid,omitempty"`
	// Target is where the link that was there led.
	Target string `json:"target,omitempty"`
	// Backup is the copy's name in the backup directory.
	Backup string `json:"backup,omitempty"`
}

// expect records a state before it is made.
func (s *snapshot) expect(state string) {
	if !slices.Contains(s.Ours, state) {
		s.Ours = append(s.Ours, state)
	}
}

// stateOf names what is at path: absent, "link:<target>" or "sha256:<hex>".
func stateOf(path string) (string, error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return absent, nil
	case err != nil:
		return "", err
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(path)
		return "link:" + target, err
	case !info.Mode().IsRegular():
		return "", fmt.Errorf("%s is neither a file nor a link: move it away", path)
	}
	f, err := os.Open(path) //nolint:gosec // the caller chose the path
	if err != nil {
		return "", err
	}
	defer f.Close() //nolint:errcheck // it was only read
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return "sha256:" + hex.EncodeToString(sum.Sum(nil)), nil
}

// stateOfText is the state of a file with that content.
func stateOfText(text []byte) string {
	sum := sha256.Sum256(text)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// take makes a snapshot of path, with a copy of what is there in backups. The
// copy is durable when take returns.
func take(path, backups string) (snapshot, error) {
	s := snapshot{Path: path}
	var err error
	if s.Before, err = stateOf(path); err != nil || s.Before == absent {
		return s, err
	}
	info, err := os.Lstat(path)
	if err != nil {
		return s, err
	}
	s.Mode = info.Mode().Perm() | info.Mode()&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		s.UID, s.GID = int(sys.Uid), int(sys.Gid)
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		s.Target, err = os.Readlink(path)
		return s, err
	}
	s.Backup, err = freeName(backups, filepath.Base(path))
	if err != nil {
		return s, err
	}
	from, err := os.Open(path) //nolint:gosec // the caller chose the path
	if err != nil {
		return s, err
	}
	defer from.Close() //nolint:errcheck // it was only read
	return s, writeFile(filepath.Join(backups, s.Backup), from, private())
}

// restore puts back what was there before, byte for byte.
func (s snapshot) restore(backups string) error {
	switch {
	case s.Before == absent:
		err := os.Remove(s.Path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	case s.Backup == "":
		return replaceLink(s.Path, s.Target)
	}
	from, err := os.Open(filepath.Join(backups, s.Backup)) //nolint:gosec // the name is from our own manifest
	if err != nil {
		return fmt.Errorf("the copy of %s is gone: %w", s.Path, err)
	}
	defer from.Close() //nolint:errcheck // it was only read
	return writeFile(s.Path, from, file{mode: s.Mode, uid: s.UID, gid: s.GID})
}

// file is how a file is to be made; an id of -1 means the process's own.
type file struct {
	mode     fs.FileMode
	uid, gid int
}

// private is a file that only the user can read.
func private() file { return file{mode: 0o600, uid: -1, gid: -1} }

// likeFile is how the file at path is made, or private if there is none.
func likeFile(path string) file {
	info, err := os.Stat(path)
	if err != nil {
		return private()
	}
	as := file{mode: info.Mode().Perm(), uid: -1, gid: -1}
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		as.uid, as.gid = int(sys.Uid), int(sys.Gid)
	}
	return as
}

// writeFile replaces path with what from holds, atomically and durably.
func writeFile(path string, from io.Reader, as file) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".depot-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, tmp.Close(), os.Remove(tmp.Name()))
		}
	}()
	if _, err = io.Copy(tmp, from); err != nil {
		return err
	}
	if os.Geteuid() == 0 && as.uid >= 0 {
		if err = tmp.Chown(as.uid, as.gid); err != nil {
			return err
		}
	}
	if err = tmp.Chmod(as.mode); err != nil {
		return err
	}
	if err = tmp.Sync(); err != nil {
		return err
	}
	if err = os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	return errors.Join(tmp.Close(), syncDir(filepath.Dir(path)))
}

func replaceLink(path, target string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Symlink(target, path)
}

func syncDir(dir string) error {
	d, err := os.Open(dir) //nolint:gosec // a directory that was just written to
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// freeName returns base with the first number that no file in dir has.
func freeName(dir, base string) (string, error) {
	for i := 0; ; i++ {
		name := base + "." + strconv.Itoa(i)
		_, err := os.Lstat(filepath.Join(dir, name))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return name, nil
		case err != nil:
			return "", err
		}
	}
}
