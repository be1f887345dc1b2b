package machine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/moby/buildkit/client"
	"golang.org/x/sys/unix"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// buildkitd takes about 100 ms to be ready, and is asked every readyPoll; one
// question is given up after probeTimeout.
const (
	readyPoll    = 5 * time.Millisecond
	probeTimeout = 5 * time.Second
)

// daemon is a running buildkitd.
type daemon struct {
	cmd  *exec.Cmd
	done chan struct{} // closed once it has ended and been waited for
	err  error         // how it ended; read after done
	tail *tail
	// cgroup is the root of the machine's hierarchy.
	cgroup string
}

// startDaemon prepares buildkitd's surroundings and starts it.
func (m *machine) startDaemon(ctx context.Context, s *depotv1.BuildkitSettings) (*daemon, error) {
	c := m.config
	if err := sweep(ctx, c.Paths, m.log); err != nil {
		return nil, err
	}
	settings, err := daemonSettings(c, s)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.Paths.Work, 0o700); err != nil {
		return nil, fmt.Errorf("start buildkitd: %w", err)
	}
	if err := os.WriteFile(c.Paths.settings(), settings, 0o600); err != nil {
		return nil, fmt.Errorf("start buildkitd: %w", err)
	}
	d := &daemon{done: make(chan struct{}), tail: &tail{out: m.output}, cgroup: c.Paths.Cgroup}
	// buildkitd is never ended by a context: only in order, or by force after
	// a deadline; see stop.
	d.cmd = exec.CommandContext(context.WithoutCancel(ctx), c.Paths.Buildkitd, "--config", c.Paths.settings()) //nolint:gosec // the image's own program
	d.cmd.Env = daemonEnv(os.Environ())
	d.cmd.Stdout, d.cmd.Stderr = d.tail, d.tail
	d.cmd.WaitDelay = time.Second // for what it started and left behind
	if err := m.kids.start(d.cmd); err != nil {
		return nil, fmt.Errorf("start buildkitd: %w", err)
	}
	go func() { // ends with the process, which stop or Run waits for
		d.err = d.cmd.Wait()
		close(d.done)
	}()
	return d, nil
}

// daemonEnv drops what speaks of descriptors that buildkitd does not get.
func daemonEnv(env []string) []string {
	var out []string
	for _, e := range env {
		if !strings.HasPrefix(e, "LISTEN_") && !strings.HasPrefix(e, "NOTIFY_SOCKET=") {
			out = append(out, e)
		}
	}
	return out
}

// awaitReady returns buildkitd's version once it lists its workers: its socket
// accepts before its controller is up, so that nothing less is proof.
func (d *daemon) awaitReady(ctx context.Context, socket string) (version string, err error) {
	for {
		version, err = probe(ctx, socket)
		if err == nil {
			return version, nil
		}
		select {
		case <-d.done:
			return "", d.failure()
		case <-ctx.Done():
			return "", fmt.Errorf("buildkitd does not list its workers in time: %w; its last words: %s", err, d.tail)
		case <-time.After(readyPoll):
		}
	}
}

func probe(ctx context.Context, socket string) (string, error) {
	// Each probe has a client of its own, and none before the socket is there:
	// one that met no listener would wait a second before it tries again.
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return "", err
	}
	_ = conn.Close()
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	c, err := client.New(ctx, "unix://"+socket)
	if err != nil {
		return "", err
	}
	defer c.Close() //nolint:errcheck // nothing is under way
	workers, err := c.ListWorkers(ctx)
	if err != nil {
		return "", err
	}
	if len(workers) == 0 {
		return "", errors.New("buildkitd has no worker")
	}
	info, err := c.Info(ctx)
	if err != nil {
		return "", err
	}
	return info.BuildkitVersion.Version, nil
}

// failure says how buildkitd ended by itself; only after done.
func (d *daemon) failure() error {
	how := "it ended without an error"
	if d.err != nil {
		how = d.err.Error()
	}
	if outOfMemory(d.cgroup) {
		how += ", for the machine ran out of memory: give the project's machines more"
	}
	return fmt.Errorf("buildkitd ended by itself (%s); its last words: %s", how, d.tail)
}

// stop ends buildkitd: TERM, then the deadline, then force. Nil means that it
// ended in order and has closed its databases. Its exit code is then 1 or 0;
// any other end (a signal, a panic) is an error.
func (d *daemon) stop(within time.Duration) error {
	if closed(d.done) {
		return d.failure()
	}
	if err := d.cmd.Process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop buildkitd: %w", err)
	}
	select {
	case <-d.done:
	case <-time.After(within):
		d.kill()
		return fmt.Errorf("buildkitd did not stop within %s and was killed; its last words: %s", within, d.tail)
	}
	if state := d.cmd.ProcessState; !state.Exited() || state.ExitCode() > 1 {
		return d.failure()
	}
	return nil
}

// kill ends buildkitd at once.
func (d *daemon) kill() {
	_ = d.cmd.Process.Kill()
	<-d.done
}

// sweep removes what a killed buildkitd leaves behind and never looks at
// again: bundles of containers, and the cgroups they ran in.
func sweep(ctx context.Context, p Paths, log *slog.Logger) error {
	bundles, err := filepath.Glob(filepath.Join(p.Root, "runc-*", "executor", "*"))
	if err != nil {
		return fmt.Errorf("sweep %s: %w", p.Root, err)
	}
	for _, b := range bundles {
		info, err := os.Lstat(b)
		if err != nil || !info.IsDir() {
			continue // runc-log.json and the like are buildkitd's own
		}
		// A mount that outlived its machine must not be emptied through.
		if err := unmountBelow(b); err != nil {
			return fmt.Errorf("sweep %s: %w", b, err)
		}
		if err := os.RemoveAll(b); err != nil {
			return fmt.Errorf("sweep: %w", err)
		}
		log.Info("removed the bundle of a container that was killed", "path", b)
	}
	if err := sweepSnapshots(ctx, p, log); err != nil {
		return err
	}
	for _, pattern := range []string{"buildkit/*", "*/buildkit/*"} { // version 2, version 1
		groups, err := filepath.Glob(filepath.Join(p.Cgroup, pattern))
		if err != nil {
			return fmt.Errorf("sweep %s: %w", p.Cgroup, err)
		}
		for _, g := range groups {
			// Only an empty cgroup can be removed; one in use stays.
			if err := unix.Rmdir(g); err != nil && !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.EBUSY) && !errors.Is(err, fs.ErrNotExist) {
				log.Warn("remove a left cgroup", "path", g, "err", err)
			}
		}
	}
	return nil
}

// unmountBelow detaches a bundle's root filesystem, if it is mounted.
func unmountBelow(bundle string) error {
	err := unix.Unmount(filepath.Join(bundle, "rootfs"), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}
