package local

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/agent/provider"
)

// Provider is the local provider.Provider.
type Provider struct {
	config   Config
	runc     string
	host     host
	bootID   string
	records  records
	rootfs   string // hash of the one that new machines get
	firewall firewall
	lock     *os.File // held while open; see Config.State

	// pool guards what machines share: slots, the firewall, root filesystems.
	pool sync.Mutex

	mu   sync.Mutex // guards busy
	busy map[string]*turn
}

// turn is a machine's lock with the number of those who have or want it.
type turn struct {
	sync.Mutex
	users int
}

var _ provider.Provider = (*Provider)(nil)

// Open readies the host: it assembles the root filesystem if its content is new,
// undoes launches that a crash interrupted before their machine ran, and leaves
// running machines alone. It refuses a host that misses a program, a nameserver
// that machines can reach, or room for [Config.Network].
func Open(ctx context.Context, config Config) (_ *Provider, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("local provider: %w", err)
		}
	}()
	config, err = config.defaults()
	if err != nil {
		return nil, err
	}
	runc, err := programs(config)
	if err != nil {
		return nil, err
	}
	host, err := thisHost()
	if err != nil {
		return nil, err
	}
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("read the boot's id: %w", err)
	}
	p := &Provider{
		config: config, runc: runc, host: host, bootID: strings.TrimSpace(string(bootID)),
		records: records{filepath.Join(config.State, "machines")},
		busy:    map[string]*turn{},
	}
	if err := p.claim(); err != nil {
		return nil, err
	}
	if err := p.ready(ctx); err != nil {
		return nil, errors.Join(err, p.lock.Close())
	}
	return p, nil
}

// programs finds the host's programs that machines are made with.
func programs(config Config) (runc string, err error) {
	runc = config.Runc
	if runc == "" {
		runc = "runc"
	}
	var errs []error
	for _, name := range []string{runc, "nft"} {
		if _, err := exec.LookPath(name); err != nil {
			errs = append(errs, fmt.Errorf("%s is not on this host: install it (Debian's packages are runc and nftables)", name))
		}
	}
	return runc, errors.Join(errs...)
}

// claim makes the state directory and keeps a second provider from it.
func (p *Provider) claim() error {
	for _, dir := range []string{p.config.State, p.records.dir, p.rootfsDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	key, err := keyOf(p.config.State)
	if err != nil {
		return err
	}
	p.firewall = firewall{
		name: "depot_" + key, devices: "dp" + key + "-", network: p.config.Network, allow: p.config.Allow, deny: p.config.Deny,
		journal: filepath.Join(p.config.State, "forwarding.json"),
	}
	p.lock, err = os.OpenFile(filepath.Join(p.config.State, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	take := func() error { return unix.Flock(int(p.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) }
	if err := provider.Lock(take); err != nil {
		return errors.Join(fmt.Errorf("lock %s: %w: another agent uses this directory: stop it, or give this one a directory of its own", p.lock.Name(), err), p.lock.Close())
	}
	return nil
}

// keyOf is a short name for a state directory. What its provider makes on the
// host carries it: it is found again, and told from other agents'.
func keyOf(state string) (string, error) {
	path, err := filepath.EvalSymlinks(state)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(path))
	return hex.EncodeToString(sum[:3]), nil
}

// ready does what Open promises, once the state directory is this provider's.
func (p *Provider) ready(ctx context.Context) error {
	if err := checkNetwork(p.config.Network, p.firewall.devices); err != nil {
		return err
	}
	if _, err := p.nameservers(); err != nil {
		return err
	}
	t, err := plan(ctx, p.config.Binaries, p.config.Authorities)
	if err != nil {
		return err
	}
	if p.rootfs, err = t.hash(); err != nil {
		return err
	}
	if err := t.assemble(ctx, filepath.Join(p.rootfsDir(), p.rootfs)); err != nil {
		return err
	}
	// After all that may refuse the host: a refusal leaves no mount.
	if err := p.runDir(); err != nil {
		return err
	}
	return p.sweep(ctx)
}

// runDir makes the run directory, in memory and readable by root alone: it holds
// secrets, and must not be there any more after a reboot.
func (p *Provider) runDir() error {
	if err := os.MkdirAll(p.config.Run, 0o700); err != nil {
		return err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(p.config.Run, &fs); err != nil {
		return fmt.Errorf("look at %s: %w", p.config.Run, err)
	}
	if fs.Type != unix.TMPFS_MAGIC && fs.Type != unix.RAMFS_MAGIC {
		if err := unix.Mount("depot", p.config.Run, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=700"); err != nil {
			return fmt.Errorf("mount memory at %s: %w", p.config.Run, err)
		}
		if err := os.WriteFile(p.ownMount(), nil, 0o600); err != nil {
			return err
		}
		p.config.Log.Info("mounted memory for secrets and run-time state", slog.String("path", p.config.Run))
	}
	return os.MkdirAll(filepath.Join(p.config.Run, "machines"), 0o700)
}

// sweep undoes launches that were interrupted, and removes what is left of
// machines that never got, or no longer have, a record.
func (p *Provider) sweep(ctx context.Context) error {
	recs, err := p.records.all()
	if err != nil {
		return err
	}
	known := map[string]bool{}
	var errs []error
	for _, rec := range recs {
		known[rec.ID] = true
		if rec.Started && (!p.alive(rec) || released(rec.process())) {
			continue
		}
		errs = append(errs, p.teardown(ctx, rec.ID))
	}
	// Where the state directory is an older copy, a machine may be left, and even
	// run, that has no record. It is not listed, which means that nothing of it
	// runs: so nothing may (one-writer).
	for _, dir := range []string{p.records.dir, filepath.Join(p.config.Run, "machines"), p.runcDir()} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		for _, e := range entries {
			if e.IsDir() && !known[e.Name()] {
				p.config.Log.WarnContext(ctx, "removing what is left of a machine without a record", "machine", e.Name())
				known[e.Name()] = true
				errs = append(errs, p.teardown(ctx, e.Name()))
			}
		}
	}
	errs = append(errs, p.settle(ctx))
	return errors.Join(errs...)
}

// settle removes what no machine needs any more: root filesystems, and with the
// last machine everything of the provider's on the host's network.
func (p *Provider) settle(ctx context.Context) error {
	p.pool.Lock()
	defer p.pool.Unlock()
	recs, err := p.records.all()
	if err != nil {
		return err
	}
	used := []string{p.rootfs}
	for _, rec := range recs {
		used = append(used, rec.Rootfs)
	}
	errs := []error{prune(p.rootfsDir(), used)}
	if len(recs) == 0 {
		errs = append(errs, p.firewall.down(ctx), removeCgroup(ctx, "/"+p.firewall.name))
	}
	return errors.Join(errs...)
}

// Close lets another provider use the state directory. Machines go on; if there
// are none, nothing of the provider is left on the host but its state.
func (p *Provider) Close(ctx context.Context) error {
	errs := []error{p.settle(ctx)}
	if ids, err := p.records.ids(); err != nil {
		errs = append(errs, err)
	} else if len(ids) == 0 {
		errs = append(errs, p.removeRunDir())
	}
	if err := errors.Join(append(errs, p.lock.Close())...); err != nil {
		return fmt.Errorf("close local provider: %w", err)
	}
	return nil
}

func (p *Provider) removeRunDir() error {
	for _, name := range []string{"machines", "runc"} {
		if err := os.RemoveAll(filepath.Join(p.config.Run, name)); err != nil {
			return err
		}
	}
	if !exists(p.ownMount()) {
		return nil
	}
	if err := unix.Unmount(p.config.Run, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", p.config.Run, err)
	}
	return nil
}

// acquire waits for one's turn with a machine and returns what ends it.
func (p *Provider) acquire(id string) (release func()) {
	p.mu.Lock()
	t := p.busy[id]
	if t == nil {
		t = &turn{}
		p.busy[id] = t
	}
	t.users++
	p.mu.Unlock()
	t.Lock()
	return func() {
		t.Unlock()
		p.mu.Lock()
		defer p.mu.Unlock()
		if t.users--; t.users == 0 {
			delete(p.busy, id)
		}
	}
}

// Stop implements provider.Provider.
func (p *Provider) Stop(_ context.Context, id string) error {
	if err := validID(id); err != nil {
		return fmt.Errorf("stop machine: %w", err)
	}
	rec, err := p.records.read(id)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("stop machine %s: %w", id, provider.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("stop machine %s: %w", id, err)
	}
	if !rec.Started {
		return nil // nothing runs; Launch or Destroy deal with what is there
	}
	if err := rec.process().signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop machine %s: %w", id, err)
	}
	return nil
}

// Destroy implements provider.Provider.
func (p *Provider) Destroy(ctx context.Context, id string) error {
	if err := validID(id); err != nil {
		return fmt.Errorf("destroy machine: %w", err)
	}
	defer p.acquire(id)()
	if err := p.teardown(ctx, id); err != nil {
		return fmt.Errorf("destroy machine %s: %w", id, err)
	}
	if err := p.settle(ctx); err != nil {
		return fmt.Errorf("destroy machine %s: %w", id, err)
	}
	return nil
}

// List implements provider.Provider.
func (p *Provider) List(_ context.Context) ([]provider.Instance, error) {
	ids, err := p.records.ids()
	if err != nil {
		return nil, err
	}
	list := make([]provider.Instance, 0, len(ids))
	for _, id := range ids {
		i, err := p.look(id)
		if errors.Is(err, fs.ErrNotExist) {
			continue // destroyed since, or a launch that failed
		}
		if err != nil {
			return nil, fmt.Errorf("list machines: %w", err)
		}
		list = append(list, i)
	}
	return list, nil
}

func (p *Provider) look(id string) (provider.Instance, error) {
	defer p.acquire(id)()
	rec, err := p.records.read(id)
	if err != nil {
		return provider.Instance{}, err
	}
	return p.instance(rec)
}

func (p *Provider) rootfsDir() string           { return filepath.Join(p.config.State, "rootfs") }
func (p *Provider) machineDir(id string) string { return filepath.Join(p.config.Run, "machines", id) }
func (p *Provider) runcDir() string             { return filepath.Join(p.config.Run, "runc") }
func (p *Provider) ownMount() string            { return filepath.Join(p.config.Run, "mounted-by-depot") }
func (p *Provider) cgroup(id string) string     { return "/" + p.firewall.name + "/" + id }
func (p *Provider) device(slot int) string      { return fmt.Sprintf("%s%x", p.firewall.devices, slot) }
