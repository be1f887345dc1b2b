package ca

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// LoadMasterKey reads the master key from the file at path, and makes that file
// on first use: 32 random bytes as hexadecimal text, readable by its owner
// only. It refuses a file that others can read or write, and one inside
// dataDir: a backup of the data directory must not hold the key to it
// (keys-stay).
//
// Whoever loses the file loses every certificate authority: keep a copy of it
// apart from the backups.
func LoadMasterKey(path, dataDir string) ([]byte, error) {
	if err := outside(path, dataDir); err != nil {
		return nil, err
	}
	key, err := readMasterKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if err := makeMasterKey(path); err != nil {
		return nil, fmt.Errorf("make master key %s: %w", path, err)
	}
	return readMasterKey(path)
}

// outside fails if path lies in dir, symbolic links followed.
func outside(path, dir string) error {
	file, err := resolve(path)
	if err != nil {
		return fmt.Errorf("master key %s: %w", path, err)
	}
	in, err := resolve(dir)
	if err != nil {
		return fmt.Errorf("data directory %s: %w", dir, err)
	}
	rel, err := filepath.Rel(in, file)
	if err != nil {
		return fmt.Errorf("master key %s: %w", path, err)
	}
	if rel != ".." && !strings.HasPrefix(rel, ".."+string(filepath.Separator)) {
		return fmt.Errorf("the master key %s lies inside the data directory %s, whose backups must not hold it: move it elsewhere", path, dir)
	}
	return nil
}

// resolve returns path absolute and without symbolic links, as far as it exists.
func resolve(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	rest := ""
	for {
		real, err := filepath.EvalSymlinks(path)
		if err == nil {
			return filepath.Join(real, rest), nil
		}
		if !errors.Is(err, fs.ErrNotExist) || path == filepath.Dir(path) {
			return "", err
		}
		path, rest = filepath.Dir(path), filepath.Join(filepath.Base(path), rest)
	}
}

func readMasterKey(path string) ([]byte, error) {
	f, err := os.Open(path) //nolint:gosec // the path is the operator's setting
	if err != nil {
		return nil, fmt.Errorf("read master key: %w", err)
	}
	defer f.Close() //nolint:errcheck // nothing was written
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read master key: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("the master key %s is not a regular file", path)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return nil, fmt.Errorf("the master key %s can be used by others (mode %04o): run chmod 600 %s, and replace the key if someone may have read it", path, mode, path)
	}
	text, err := io.ReadAll(io.LimitReader(f, 4*masterKeyBytes))
	if err != nil {
		return nil, fmt.Errorf("read master key: %w", err)
	}
	key, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil || len(key) != masterKeyBytes {
		// What was decoded stays out of the message.
		return nil, fmt.Errorf("the master key %s does not hold %d hexadecimal digits: put back the file that belongs to this server", path, 2*masterKeyBytes)
	}
	return key, nil
}

// makeMasterKey writes a new key whole or not at all. Of two processes that do
// it at once the first wins, and both read what it wrote.
func makeMasterKey(path string) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	key := make([]byte, masterKeyBytes)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".master-key-*") // made with mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) //nolint:errcheck // only the name: the link below keeps the file
	_, err = fmt.Fprintln(f, hex.EncodeToString(key))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(dir)
}

// syncDir makes a new name in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir) //nolint:gosec // the path is the operator's setting
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
