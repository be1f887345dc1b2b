package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/agent/provider"
)

// maxExitBytes bounds exit.json, which the machine writes.
const maxExitBytes = 64 << 10

// instance tells a machine's state from its record and the host.
func (p *Provider) instance(rec record) (provider.Instance, error) {
	i := provider.Instance{
		ID: rec.ID, Volume: rec.Volume, State: provider.Running, Address: rec.Address,
		Labels: rec.Labels, Launched: rec.Launched, Warnings: rec.Warnings,
	}
	if p.alive(rec) {
		return i, nil
	}
	if rec.Exit == nil {
		exit := p.exit(rec)
		rec.Exit = &exit
		if err := p.records.write(rec); err != nil {
			return provider.Instance{}, err
		}
	}
	i.State, i.Exit = provider.Exited, rec.Exit
	return i, nil
}

func (p *Provider) alive(rec record) bool {
	return rec.Started && rec.Exit == nil && rec.BootID == p.bootID && rec.process().running()
}

// exit says how a machine that no longer runs ended.
func (p *Provider) exit(rec record) provider.Exit {
	if !rec.Started {
		return provider.Exit{Reason: "the launch was interrupted before the machine ran"}
	}
	if rec.BootID != p.bootID {
		return provider.Exit{Reason: "the host was rebooted"}
	}
	exit, err := readExit(filepath.Join(p.machineDir(rec.ID), stateDir, "exit.json"))
	switch {
	case err == nil:
		return exit
	case !errors.Is(err, fs.ErrNotExist):
		return provider.Exit{Reason: fmt.Sprintf("the machine's last word cannot be read: %v", err)}
	case outOfMemory(cgroupRoot, p.cgroup(rec.ID)):
		return provider.Exit{Reason: "the machine ran out of memory and the kernel ended it: give the project's machines more memory"}
	}
	reason := "the machine was killed, or its agent crashed"
	if line := lastLine(p.records.log(rec.ID)); line != "" {
		reason += "; last in its log: " + line
	}
	return provider.Exit{Reason: reason}
}

// readExit reads exit.json as what it is: a file by somebody else. A link, a
// pipe or an endless file in its place must not lead or hold up the host.
func readExit(path string) (exit provider.Exit, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0) //nolint:gosec // G304: what it may be is checked below
	if err != nil {
		return provider.Exit{}, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return provider.Exit{}, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxExitBytes {
		return provider.Exit{}, fmt.Errorf("exit.json is no ordinary file of at most %d bytes", maxExitBytes)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxExitBytes))
	if err != nil {
		return provider.Exit{}, err
	}
	if err := json.Unmarshal(b, &exit); err != nil {
		return provider.Exit{}, fmt.Errorf("exit.json: %w", err)
	}
	return exit, nil
}

// lastLine returns the last line of a log, shortened; empty if there is none.
func lastLine(path string) string {
	const tail = 1024
	f, err := os.Open(path) //nolint:gosec // G304: the id in the path was checked
	if err != nil {
		return ""
	}
	defer f.Close() //nolint:errcheck // it was only read
	if info, err := f.Stat(); err == nil && info.Size() > tail {
		if _, err := f.Seek(-tail, io.SeekEnd); err != nil {
			return ""
		}
	}
	b, err := io.ReadAll(io.LimitReader(f, tail))
	if err != nil {
		return ""
	}
	b = bytes.TrimSpace(b)
	return strings.ToValidUTF8(string(b[bytes.LastIndexByte(b, '\n')+1:]), "?")
}

// teardown ends a machine and removes all of it, its record last. It finds what
// is there by names that follow from the id and the record, so it can be
// repeated from any point, and needs nothing that a launch had in memory.
func (p *Provider) teardown(ctx context.Context, id string) error {
	rec, err := p.records.read(id)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	known := err == nil
	if known && rec.PID != 0 && rec.BootID == p.bootID {
		// The kernel ends all others of the process namespace with its init.
		if err := rec.process().kill(ctx); err != nil {
			return err
		}
	}
	if exists(filepath.Join(p.runcDir(), id)) {
		if err := p.command(ctx, id, "delete", "--force", id); err != nil {
			return err
		}
	}
	if known {
		if err := linkDown(p.device(rec.Slot)); err != nil {
			return err
		}
	}
	if err := removeCgroup(ctx, p.cgroup(id)); err != nil {
		return err
	}
	dir := p.machineDir(id)
	// EINVAL: not mounted; ENOENT: not even there.
	if err := unix.Unmount(filepath.Join(dir, secretsDir), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount the machine's files: %w", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove the machine's run directory: %w", err)
	}
	// A runc that ended with its agent has left its log.
	if err := ignoreMissing(os.Remove(p.runcLog(id))); err != nil {
		return err
	}
	return p.records.remove(id)
}
