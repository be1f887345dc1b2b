package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/opendepot/depot/agent/provider"
)

// cleanUpTime bounds what is done after a launch failed or was cancelled.
const cleanUpTime = 30 * time.Second

// Launch implements provider.Provider.
func (p *Provider) Launch(ctx context.Context, spec provider.MachineSpec) (provider.Instance, error) {
	if err := validate(spec); err != nil {
		return provider.Instance{}, fmt.Errorf("launch machine: %w", err)
	}
	defer p.acquire(spec.ID)()
	i, err := p.launch(ctx, spec)
	if err != nil {
		return provider.Instance{}, fmt.Errorf("launch machine %s: %w", spec.ID, err)
	}
	return i, nil
}

func (p *Provider) launch(ctx context.Context, spec provider.MachineSpec) (provider.Instance, error) {
	rec, err := p.records.read(spec.ID)
	switch {
	case err == nil && rec.Volume != spec.Volume:
		return provider.Instance{}, fmt.Errorf("%w: it was launched with volume %s, now %s is asked for", provider.ErrUnusable, rec.Volume, spec.Volume)
	case err == nil && rec.Started:
		return p.instance(rec)
	case err == nil: // what could not be cleaned up after an earlier attempt
		if err := p.teardown(ctx, spec.ID); err != nil {
			return provider.Instance{}, err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return provider.Instance{}, err
	}
	// The volume comes before the record: a refusal leaves no trace.
	volume, err := p.config.OpenVolume(ctx, spec.Volume, spec.ID, spec.WriterEpoch)
	if err != nil {
		return provider.Instance{}, err
	}
	rec, err = p.start(ctx, spec, volume)
	if err := volume.Close(); err != nil {
		p.config.Log.WarnContext(ctx, "close volume", "volume", spec.Volume, "err", err)
	}
	if err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTime)
		defer cancel()
		return provider.Instance{}, errors.Join(err, p.teardown(ctx, spec.ID), p.settle(ctx))
	}
	return p.instance(rec)
}

// start makes the machine from nothing.
func (p *Provider) start(ctx context.Context, spec provider.MachineSpec, volume Writer) (record, error) {
	rec, err := p.reserve(spec)
	if err != nil {
		return record{}, err
	}
	links, err := uplinks(p.destinations())
	if err != nil {
		return record{}, err
	}
	door, address, err := p.openDoor(ctx, rec)
	if err != nil {
		return record{}, err
	}
	defer door.Close() //nolint:errcheck // the machine has its copy
	rec.Address = address

	// The firewall is up before the machine has a link, at the latest.
	var g errgroup.Group
	g.Go(func() error {
		p.pool.Lock()
		defer p.pool.Unlock()
		return p.firewall.up(ctx, links)
	})
	err = p.create(ctx, &rec, spec, links, volume, door)
	if err := errors.Join(err, g.Wait()); err != nil {
		return record{}, err
	}
	if err := linkUp(p.device(rec.Slot), rec.PID, mtuOf(links), subnetOf(p.config.Network, rec.Slot)); err != nil {
		return record{}, err
	}
	// From here on the machine may have written its volume, so this is stored
	// first; Open tells the two apart if a crash falls in between.
	rec.Started = true
	if err := p.records.write(rec); err != nil {
		return record{}, err
	}
	return rec, p.command(ctx, rec.ID, "start", rec.ID)
}

// reserve stores the intent, and with it the slot.
func (p *Provider) reserve(spec provider.MachineSpec) (record, error) {
	p.pool.Lock()
	defer p.pool.Unlock()
	recs, err := p.records.all()
	if err != nil {
		return record{}, err
	}
	slot, ok := freeSlot(recs, slots(p.config.Network))
	if !ok {
		return record{}, fmt.Errorf("%w: all %d networks for machines in %s are taken", provider.ErrNoCapacity, slots(p.config.Network), p.config.Network)
	}
	_, _, warnings := p.host.limits(spec)
	rec := record{
		ID: spec.ID, Volume: spec.Volume, Labels: spec.Labels, Launched: time.Now().UTC(), Warnings: warnings,
		BootID: p.bootID, Slot: slot, Rootfs: p.rootfs,
	}
	return rec, p.records.write(rec)
}

// openDoor listens on a free port of the range, each slot trying another first,
// so that a port is not soon used again.
func (p *Provider) openDoor(ctx context.Context, rec record) (*os.File, string, error) {
	ports := int(p.config.LastPort) - int(p.config.FirstPort) + 1
	for i := range ports {
		port := strconv.Itoa(int(p.config.FirstPort) + (rec.Slot+int(rec.Launched.Unix())+i)%ports)
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort(p.config.Listen, port))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			return nil, "", fmt.Errorf("listen for clients: %w", err)
		}
		tcp, ok := l.(*net.TCPListener)
		if !ok {
			return nil, "", errors.Join(errors.New("listen for clients: not a TCP socket"), l.Close())
		}
		f, err := tcp.File()
		if err := errors.Join(err, l.Close()); err != nil {
			return nil, "", fmt.Errorf("listen for clients: %w", err)
		}
		return f, net.JoinHostPort(p.config.Advertise, port), nil
	}
	return nil, "", fmt.Errorf("%w: all ports from %d to %d are in use", provider.ErrNoCapacity, p.config.FirstPort, p.config.LastPort)
}

// create makes the bundle and has runc make the container, whose PID 1 then
// waits to be let go.
func (p *Provider) create(ctx context.Context, rec *record, spec provider.MachineSpec, links []uplink, volume Writer, door *os.File) error {
	dir := p.machineDir(rec.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	if err := writeSecrets(dir, spec.Files); err != nil {
		return err
	}
	servers, err := p.nameservers()
	if err != nil {
		return err
	}
	cni, err := subnetOf(p.config.Network, rec.Slot).cniConfig(mtuOf(links))
	if err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	for name, content := range map[string][]byte{"resolv.conf": resolvConfFor(servers), "cni.conflist": cni} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil { //nolint:gosec // G306: not secret, in a directory that is
			return fmt.Errorf("bundle: %w", err)
		}
	}
	cpus, memoryBytes, _ := p.host.limits(spec)
	b := bundle{
		id: rec.ID, rootfs: filepath.Join(p.rootfsDir(), rec.Rootfs), cgroup: p.cgroup(rec.ID), volume: volume.Path(),
		dir: dir, relay: p.config.Relay, cpus: cpus, memoryBytes: memoryBytes,
	}
	if err := b.write(p.host); err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	log, err := os.OpenFile(p.records.log(rec.ID), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("machine's log: %w", err)
	}
	defer log.Close() //nolint:errcheck // the machine has its copy
	pidFile := filepath.Join(dir, "pid")
	if err := p.spawn(ctx, rec.ID, log, []*os.File{door, volume.LockFile()},
		"create", "--bundle", dir, "--pid-file", pidFile, "--preserve-fds", strconv.Itoa(listenFDs), rec.ID); err != nil {
		return err
	}
	return p.note(rec, pidFile)
}

// note records the process that runc made, so that the machine can be found and
// ended without runc.
func (p *Provider) note(rec *record, pidFile string) error {
	b, err := os.ReadFile(pidFile) //nolint:gosec // G304: the id in the path was checked
	if err != nil {
		return fmt.Errorf("read the machine's process id: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return fmt.Errorf("read the machine's process id: %w", err)
	}
	proc, err := find(pid)
	if err != nil {
		return err
	}
	rec.PID, rec.StartTicks = proc.pid, proc.start
	return p.records.write(*rec)
}

// released reports whether runc let a process go: until then it is runc's own.
func released(proc process) bool {
	args, err := os.ReadFile("/proc/" + strconv.Itoa(proc.pid) + "/cmdline")
	return err == nil && bytes.HasPrefix(args, []byte(agentPath+"\x00")) && proc.running()
}

// command runs runc on a container that exists.
func (p *Provider) command(ctx context.Context, id string, args ...string) error {
	return p.spawn(ctx, id, nil, nil, args...)
}

// spawn runs runc. What it starts must live on when this process ends, so it
// shares no pipe, no session and no cancellation with it. Runc itself ends with
// this process: the next one must not find it still at work on what it undoes.
func (p *Provider) spawn(ctx context.Context, id string, output *os.File, files []*os.File, args ...string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTime)
	defer cancel()
	log := p.runcLog(id)
	global := []string{"--root", p.runcDir(), "--log", log, "--log-format", "json"}
	cmd := exec.CommandContext(ctx, p.runc, append(global, args...)...) //nolint:gosec // G204: ids were checked
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.ExtraFiles = files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if output != nil {
		cmd.Stdout, cmd.Stderr = output, output
	}
	runtime.LockOSThread() // the kernel takes the end of this thread for the parent's
	defer runtime.UnlockOSThread()
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("runc %s: %w: %s", args[0], err, lastMessage(log))
	}
	return errors.Join(err, ignoreMissing(os.Remove(log)))
}

func (p *Provider) runcLog(id string) string {
	return filepath.Join(p.config.Run, "machines", id+".runc.log")
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// lastMessage is what runc logged last.
func lastMessage(path string) string {
	var line struct {
		Msg string `json:"msg"`
	}
	text := lastLine(path)
	if json.Unmarshal([]byte(text), &line) == nil && line.Msg != "" {
		return line.Msg
	}
	return text
}

// destinations are addresses that machines are led to besides the default route.
func (p *Provider) destinations() []netip.Addr {
	to, err := p.nameservers()
	if err != nil {
		to = nil // create reports it
	}
	for _, a := range p.config.Allow {
		to = append(to, a.Prefix.Addr())
	}
	return to
}

// nameservers are looked up for each machine, because a host moves.
func (p *Provider) nameservers() ([]netip.Addr, error) {
	local, err := localAddrs()
	if err != nil {
		return nil, err
	}
	return nameservers(p.config.Nameservers, local, p.config.Allow)
}
