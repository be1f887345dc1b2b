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
	"strings"
	"syscall"
)

// The keys of config.json that are changed.
const (
	aliasesKey   = "aliases"
	builderKey   = "builder"
	extraDirsKey = "cliPluginsExtraDirs"
	aliasValue   = `"buildx"`
)

// configChange is what becomes of config.json.
type configChange struct {
	before  jsonText // as the user has it, without what is ours
	text    jsonText
	as      file
	changes bool
	// alias and extraDir are what the text has of ours.
	alias    bool
	extraDir string
}

// previous is the value that the alias had, or nil.
func (t jsonText) previous() json.RawMessage {
	value, ok := t.get(aliasesKey, builderKey)
	if !ok {
		return nil
	}
	return value
}

// planConfig reads config.json and decides what it should be. It touches
// nothing.
func (s *session) planConfig() (configChange, error) {
	c := configChange{as: likeFile(s.paths.Config)}
	raw, err := os.ReadFile(s.paths.Config)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return c, err
	}
	text, err := parseJSONText(raw)
	if err != nil {
		return c, fmt.Errorf("%s is not valid: %w. Mend it first: nothing was changed", s.paths.Config, err)
	}
	c.before = s.withoutOurs(text)
	c.text = c.before
	if string(c.before.previous()) != aliasValue {
		c.text, c.alias = c.text.set(aliasValue, aliasesKey, builderKey), true
	}
	shadows, err := s.shadowed(c.text)
	if err != nil {
		return c, err
	}
	if shadows {
		dirs := append([]string{s.paths.Plugins}, extraDirs(c.text)...)
		value, err := json.Marshal(dirs)
		if err != nil {
			return c, err
		}
		c.text, c.extraDir = c.text.set(string(value), "", extraDirsKey), s.paths.Plugins
	}
	c.changes = c.alias || c.extraDir != "" || s.manifest.find(s.paths.Config) != nil
	return c, nil
}

// withoutOurs takes out of text what an earlier run put in.
func (s *session) withoutOurs(text jsonText) jsonText {
	value, ok := text.get(aliasesKey, builderKey)
	if ok && s.manifest.Alias && string(value) == aliasValue {
		if s.manifest.Previous != nil {
			text = text.set(string(s.manifest.Previous), aliasesKey, builderKey)
		} else {
			text = text.remove(aliasesKey, builderKey, true)
		}
	}
	dirs := extraDirs(text)
	if s.manifest.ExtraDir == "" || len(dirs) == 0 || dirs[0] != s.manifest.ExtraDir {
		return text
	}
	rest, err := json.Marshal(dirs[1:])
	if err != nil {
		return text // a list of strings always has a JSON form
	}
	return text.set(string(rest), "", extraDirsKey)
}

func extraDirs(text jsonText) []string {
	value, ok := text.get(extraDirsKey)
	if !ok {
		return nil
	}
	var dirs []string
	if err := json.Unmarshal(value, &dirs); err != nil {
		return nil // docker says so itself, with every command
	}
	return dirs
}

// shadowed reports whether a directory that the CLI searches before the user's
// plugin directory has a plugin of our names.
func (s *session) shadowed(text jsonText) (bool, error) {
	for _, dir := range extraDirs(text) {
		if filepath.Clean(dir) == s.paths.Plugins {
			return false, nil
		}
		for _, name := range []string{buildxPlugin, depotPlugin} {
			_, err := os.Stat(filepath.Join(dir, name))
			switch {
			case err == nil:
				s.report.notef("%s has a %s of its own and goes before your plugin directory: your directory was put first in %s",
					dir, name, extraDirsKey)
				return true, nil
			case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR):
				return false, err
			}
		}
	}
	return false, nil
}

func (s *session) writeConfig(c configChange) error {
	if !c.changes {
		return nil
	}
	if err := writeFile(s.paths.Config, bytes.NewReader(c.text), c.as); err != nil {
		return fmt.Errorf("write %s: %w", s.paths.Config, err)
	}
	if c.alias {
		s.report.donef("`docker build` is `docker buildx build` (alias in %s)", s.paths.Config)
	}
	return nil
}

// planPlugins returns the plugin files to write: those that are not the
// running program itself.
func (s *session) planPlugins(executable string) ([]string, error) {
	self, err := os.Stat(executable)
	if err != nil {
		return nil, fmt.Errorf("find the program's own file: %w", err)
	}
	var paths []string
	for _, name := range []string{depotPlugin, buildxPlugin} {
		path := filepath.Join(s.paths.Plugins, name)
		info, err := os.Stat(path)
		if err == nil && os.SameFile(info, self) && s.manifest.find(path) == nil {
			continue // the program, or the user's own link to it
		}
		paths = append(paths, path)
	}
	return paths, nil
}

// copyProgram puts the program at path. It is a copy, not a link: whatever
// writes through the one name later must not change the other.
func (s *session) copyProgram(executable, path string) error {
	want, err := stateOf(executable)
	if err != nil {
		return err
	}
	if have, err := stateOf(path); err != nil || have == want {
		return err
	}
	from, err := os.Open(executable) //nolint:gosec // the program's own file
	if err != nil {
		return err
	}
	defer from.Close() //nolint:errcheck // it was only read
	if err := writeFile(path, from, file{mode: 0o755, uid: -1, gid: -1}); err != nil {
		return fmt.Errorf("install %s: %w", path, err)
	}
	if entry := s.manifest.find(path); entry != nil && entry.Before != absent {
		s.report.donef("installed %s; what was there is kept", path)
	} else {
		s.report.donef("installed %s", path)
	}
	return nil
}

// inStore reports whether a path is in buildx's store.
func (s *session) inStore(path string) bool {
	return strings.HasPrefix(path, s.paths.Buildx+string(filepath.Separator))
}

// removeDirs removes the directories that did not exist before, in this run or
// in the one that installed, and that are empty now: children first.
func (s *session) removeDirs(fresh []string) {
	dirs := slices.Concat(s.manifest.Dirs, fresh)
	slices.Sort(dirs)
	for _, dir := range slices.Backward(slices.Compact(dirs)) {
		os.Remove(dir) //nolint:errcheck,gosec // one that is not empty stays
	}
}
