package configure

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// manifestVersion is raised when an older program could not undo what a newer
// one installed.
const manifestVersion = 1

// manifest says what an installation changed.
type manifest struct {
	Version int `json:"version"`
	// Builders are the names of the builders that were made.
	Builders []string `json:"builders"`
	// Alias tells that the alias in config.json is ours; Previous is the JSON
	// value that it had before, if it had one.
	Alias    bool            `json:"alias"`
	Previous json.RawMessage `json:"previousAlias,omitempty"`
	// ExtraDir is the directory that was put first in cliPluginsExtraDirs;
	// empty if none was.
	ExtraDir string `json:"extraDir,omitempty"`
	// Dirs did not exist before, parents first.
	Dirs []string `json:"dirs,omitempty"`
	// Login is the login whose project was changed; nil if none was.
	Login *LoginProject `json:"login,omitempty"`
	// Files are the snapshots.
	Files []snapshot `json:"files"`

	fresh bool // nothing is installed: there is no file yet
}

func manifestPath(state string) string { return filepath.Join(state, "configure.json") }

func backupDir(state string) string { return filepath.Join(state, "backups") }

// readManifest returns a fresh one if there is none.
func readManifest(state string) (*manifest, error) {
	path := manifestPath(state)
	text, err := os.ReadFile(path) //nolint:gosec // a fixed name in the user's own directory
	if errors.Is(err, fs.ErrNotExist) {
		return &manifest{Version: manifestVersion, fresh: true}, nil
	}
	if err != nil {
		return nil, err
	}
	var m manifest
	if err := json.Unmarshal(text, &m); err != nil {
		return nil, fmt.Errorf("%s, which says how to undo `docker depot configure`, is damaged: %w. The copies of the files that were replaced are in %s",
			path, err, backupDir(state))
	}
	if m.Version > manifestVersion {
		return nil, fmt.Errorf("%s was written by a newer docker-depot: use that one", path)
	}
	return &m, nil
}

// write makes the manifest durable.
func (m *manifest) write(state string) error {
	text, err := json.MarshalIndent(m, "", "\t")
	if err != nil {
		return err
	}
	if err := writeFile(manifestPath(state), bytes.NewReader(append(text, '\n')), private()); err != nil {
		return err
	}
	m.fresh = false
	return nil
}

// note takes a snapshot of path, unless the one that is there still holds:
// what is at path is then what an earlier run left, not what the user had.
func (m *manifest) note(path, state string) error {
	now, err := stateOf(path)
	if err != nil {
		return err
	}
	old := m.find(path)
	if old != nil && (now == old.Before || slices.Contains(old.Ours, now)) {
		return nil
	}
	if err := os.MkdirAll(backupDir(state), 0o700); err != nil {
		return err
	}
	s, err := take(path, backupDir(state))
	if err != nil {
		return err
	}
	m.put(s)
	return nil
}

// noteText is note for a file in which something may be ours: if the user
// changed it since, what is to be put back is text, the file without ours.
func (m *manifest) noteText(path, state string, text []byte) error {
	old := m.find(path)
	if err := m.note(path, state); err != nil || old == nil {
		return err
	}
	s := m.find(path)
	if len(s.Ours) > 0 || s.Backup == "" {
		return nil // the earlier snapshot holds, or nothing is there
	}
	s.Before = stateOfText(text)
	return writeFile(filepath.Join(backupDir(state), s.Backup), bytes.NewReader(text), private())
}

// keep takes a snapshot of path once: for files that change with each build.
func (m *manifest) keep(path, state string) error {
	if m.find(path) != nil {
		return nil
	}
	return m.note(path, state)
}

// noteLogin notes that the project of a login is about to be changed. What it
// was before the first change stays what is put back, unless the user chose
// another one meanwhile.
func (m *manifest) noteLogin(l *LoginProject) {
	if l == nil {
		return
	}
	if old := m.Login; old != nil && old.Server == l.Server && old.After == l.Before {
		l.Before = old.Before
	}
	m.Login = l
}

func (m *manifest) put(s snapshot) {
	if old := m.find(s.Path); old != nil {
		*old = s
		return
	}
	m.Files = append(m.Files, s)
}

func (m *manifest) find(path string) *snapshot {
	for i := range m.Files {
		if m.Files[i].Path == path {
			return &m.Files[i]
		}
	}
	return nil
}

// settle records what the installation left at each path.
func (m *manifest) settle(state string) error {
	for i := range m.Files {
		now, err := stateOf(m.Files[i].Path)
		if err != nil {
			return err
		}
		m.Files[i].expect(now)
	}
	return m.write(state)
}

// remove forgets the installation.
func (m *manifest) remove(state string) error {
	if err := os.RemoveAll(backupDir(state)); err != nil {
		return err
	}
	if err := os.Remove(manifestPath(state)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	m.fresh = true
	return nil
}
