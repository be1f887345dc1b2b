package configure

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/docker/buildx/store"
	"github.com/docker/buildx/store/storeutil"
	"github.com/docker/cli/cli/command"
)

// ErrNotInstalled is returned by [Uninstall] where there is nothing to undo.
var ErrNotInstalled = errors.New("this docker CLI is not configured for depot: nothing to undo")

// Uninstall puts back what was there before [Install].
func Uninstall(ctx context.Context, dockerCli command.Cli) (Report, error) {
	s, done, err := open(dockerCli)
	if err != nil {
		return Report{}, err
	}
	defer done()
	if s.manifest.fresh {
		return Report{}, ErrNotInstalled
	}
	err = s.uninstall(ctx)
	return *s.report, err
}

// uninstall undoes in the reverse order, so that `docker build` never leads to
// a builder that is gone. It tries all; the manifest goes only when all
// succeeded.
func (s *session) uninstall(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	var errs []error
	for _, entry := range slices.Backward(s.manifest.Files) {
		if s.inStore(entry.Path) || slices.Contains(s.buildFiles(), entry.Path) {
			continue
		}
		if err := s.undo(entry); err != nil {
			errs = append(errs, fmt.Errorf("restore %s: %w", entry.Path, err))
		}
	}
	if err := s.undoStore(); err != nil {
		errs = append(errs, err)
	}
	if err := s.undoBuilds(); err != nil {
		errs = append(errs, err)
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	s.report.Login = s.manifest.Login
	return s.manifest.remove(s.paths.State)
}

// undo restores a plugin file or config.json.
func (s *session) undo(entry snapshot) error {
	now, err := stateOf(entry.Path)
	switch {
	case err != nil:
		return err
	case now == entry.Before:
		return nil
	case slices.Contains(entry.Ours, now):
		if err := entry.restore(backupDir(s.paths.State)); err != nil {
			return err
		}
		s.report.donef("restored %s", entry.Path)
		return nil
	case entry.Path == s.paths.Config:
		return s.undoConfig()
	default:
		s.report.notef("%s was changed after `docker depot configure`: it was left as it is", entry.Path)
		return nil
	}
}

// undoConfig takes ours out of a config.json that the user changed.
func (s *session) undoConfig() error {
	raw, err := os.ReadFile(s.paths.Config)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	text, err := parseJSONText(raw)
	if err != nil {
		return fmt.Errorf("it is not valid JSON: %w. Mend it and run the command again", err)
	}
	if err := writeFile(s.paths.Config, bytes.NewReader(s.withoutOurs(text)), likeFile(s.paths.Config)); err != nil {
		return err
	}
	s.report.notef("%s was changed after `docker depot configure`: only depot's own entries were taken out of it", s.paths.Config)
	return nil
}

// undoBuilds removes what builds have left, where they have had nothing before.
func (s *session) undoBuilds() error {
	var errs []error
	for _, path := range s.buildFiles() {
		if entry := s.manifest.find(path); entry == nil || entry.Before != absent {
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// undoStore removes the builders and restores the current one.
func (s *session) undoStore() error {
	txn, release, err := storeutil.GetStore(s.cli)
	if err != nil {
		return fmt.Errorf("open buildx's store: %w", err)
	}
	defer release()
	current, err := currentName(filepath.Join(s.paths.Buildx, "current"))
	if err != nil {
		return err
	}
	for _, name := range s.manifest.Builders {
		if err := s.removeBuilder(txn, name); err != nil {
			return fmt.Errorf("remove builder %q: %w", name, err)
		}
	}
	chosen := current != "" && !slices.Contains(s.manifest.Builders, current)
	if chosen {
		s.report.notef("builder %q was made the current one after `docker depot configure`: it stays that", current)
	}
	for _, entry := range s.manifest.Files {
		if !s.inStore(entry.Path) || slices.Contains(s.buildFiles(), entry.Path) || chosen && !s.comesWithBuilder(entry.Path) {
			continue
		}
		now, err := stateOf(entry.Path)
		if err == nil && now != entry.Before {
			err = entry.restore(backupDir(s.paths.State))
		}
		if err != nil {
			return fmt.Errorf("restore %s: %w", entry.Path, err)
		}
	}
	return nil
}

// removeBuilder removes a builder that was not there before.
func (s *session) removeBuilder(txn *store.Txn, name string) error {
	entry := s.manifest.find(filepath.Join(s.paths.Buildx, "instances", name))
	group, err := txn.NodeGroupByName(name)
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && group.Driver != DriverName:
		return nil
	case err != nil:
		return err
	case entry != nil && entry.Before != absent:
		return nil // restored with the files
	}
	s.report.donef("removed builder %q", name)
	return txn.Remove(name)
}

// comesWithBuilder reports whether a file of the store belongs to one of our
// builders, whichever is the current one.
func (s *session) comesWithBuilder(path string) bool {
	for _, name := range s.manifest.Builders {
		if slices.Contains(s.builderFiles(name), path) {
			return true
		}
	}
	return false
}

// currentName reads which builder buildx's store has as the current one.
func currentName(path string) (string, error) {
	text, err := os.ReadFile(path) //nolint:gosec // a fixed name in buildx's store
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	var current struct{ Name string }
	if err := json.Unmarshal(text, &current); err != nil {
		return "", fmt.Errorf("%s is damaged: %w: remove it", path, err)
	}
	return current.Name, nil
}
