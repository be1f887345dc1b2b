package local

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opendepot/depot/agent/provider"
)

// record is what is known of a machine on disk. It is written before anything
// of the machine is made; what follows from a launch is added as it is known.
type record struct {
	ID       string            `json:"id"`
	Volume   string            `json:"volume"`
	Labels   map[string]string `json:"labels,omitempty"`
	Launched time.Time         `json:"launched"`
	Warnings []string          `json:"warnings,omitempty"`
	// BootID is the kernel's name for the boot that the machine ran in.
	BootID string `json:"boot_id"`
	// Slot numbers the machine's /24 and its network device.
	Slot int `json:"slot"`
	// Rootfs is the hash of the root filesystem in use.
	Rootfs string `json:"rootfs"`
	// Address is empty until the door is open.
	Address string `json:"address,omitempty"`
	// PID and StartTicks name PID 1 as the host sees it; the second tells it from
	// a later process that got the same number.
	PID        int    `json:"pid,omitempty"`
	StartTicks uint64 `json:"start_ticks,omitempty"`
	// Started is set before PID 1 is let go. Without it nothing has touched the
	// volume, and the launch can be undone and done again.
	Started bool `json:"started,omitempty"`
	// Exit is kept once seen, because the run directory does not outlive a reboot.
	Exit *provider.Exit `json:"exit,omitempty"`
}

func (r record) process() process { return process{r.PID, r.StartTicks} }

// records is the directory of records: one directory for each machine.
type records struct{ dir string }

func (r records) machine(id string) string { return filepath.Join(r.dir, id) }
func (r records) path(id string) string    { return filepath.Join(r.dir, id, "record.json") }
func (r records) log(id string) string     { return filepath.Join(r.dir, id, "machine.log") }

// read returns fs.ErrNotExist if there is no such machine.
func (r records) read(id string) (record, error) {
	b, err := os.ReadFile(r.path(id))
	if err != nil {
		return record{}, fmt.Errorf("read machine %s: %w", id, err)
	}
	var rec record
	if err := json.Unmarshal(b, &rec); err != nil {
		return record{}, fmt.Errorf("read machine %s: %s: %w", id, r.path(id), err)
	}
	return rec, nil
}

// write replaces the record as a whole and returns once it is on disk.
func (r records) write(rec record) error {
	b, err := json.MarshalIndent(rec, "", "  ")
	if err != nil {
		return fmt.Errorf("write machine %s: %w", rec.ID, err)
	}
	dir := r.machine(rec.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("write machine %s: %w", rec.ID, err)
	}
	if err := writeDurably(r.path(rec.ID), append(b, '\n')); err != nil {
		return fmt.Errorf("write machine %s: %w", rec.ID, err)
	}
	return syncDir(r.dir)
}

// remove forgets a machine: its log first, its record last.
func (r records) remove(id string) error {
	for _, p := range []string{r.log(id), r.path(id) + ".new", r.path(id)} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("forget machine %s: %w", id, err)
		}
	}
	if err := os.Remove(r.machine(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget machine %s: %w", id, err)
	}
	return syncDir(r.dir)
}

// ids lists the machines on disk, in order. A directory without a record is
// what a crash left of a launch's first or a removal's last step.
func (r records) ids() ([]string, error) {
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return nil, fmt.Errorf("list machines: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if _, err := os.Stat(r.path(e.Name())); err == nil {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// all reads every record.
func (r records) all() ([]record, error) {
	ids, err := r.ids()
	if err != nil {
		return nil, err
	}
	recs := make([]record, 0, len(ids))
	for _, id := range ids {
		rec, err := r.read(id)
		if errors.Is(err, fs.ErrNotExist) {
			continue // destroyed since
		}
		if err != nil {
			return nil, err
		}
		recs = append(recs, rec)
	}
	return recs, nil
}

// freeSlot is the lowest slot below limit that no record has, or false.
func freeSlot(recs []record, limit int) (int, bool) {
	for slot := range limit {
		if !slices.ContainsFunc(recs, func(r record) bool { return r.Slot == slot }) {
			return slot, true
		}
	}
	return 0, false
}

func writeDurably(path string, b []byte) (err error) {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600) //nolint:gosec // G304: the id in the path was checked
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir) //nolint:gosec // G304: a directory of the provider's
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
