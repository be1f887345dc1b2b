package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/agent/cloud"
	"github.com/opendepot/depot/agent/machine"
	"github.com/opendepot/depot/agent/provider/btrfs"
	"github.com/opendepot/depot/agent/provider/local"
)

// runCloud is `depot-agent cloud`. The order matters: the state's lock first,
// then what machines need of the host, then the relay, then the loop.
func runCloud(ctx context.Context, c cloudConfig, w world) (err error) {
	s, err := c.check()
	if err != nil {
		return err
	}
	log, err := newLog(w, c.logFormat, c.logLevel)
	if err != nil {
		return err
	}
	if unix.Geteuid() != 0 {
		return errors.New("launching machines on this host needs root: run it with sudo, or as a service of the system")
	}
	health, err := listenHealth(ctx, c.health)
	if err != nil {
		return err
	}
	defer health.Close() //nolint:errcheck // closed already, but for errors
	state, err := cloud.OpenState(c.stateDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, state.Close()) }()

	store, err := btrfs.Open(ctx, btrfs.Config{Dir: filepath.Join(c.stateDir, "volumes"), PoolBytes: s.poolBytes, Logger: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	relay := &cloud.Relay{Dir: filepath.Join(c.runDir, "relay"), Log: log, Dial: func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", s.server)
	}}
	provider, err := openLocal(ctx, c, s, store, relay.Dir, log)
	if err != nil {
		return err
	}
	emulation, err := emulate(ctx, s.pools)
	if err != nil {
		return errors.Join(err, provider.Close(ctx))
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		err = errors.Join(err, emulation.close(ctx, provider), provider.Close(ctx))
	}()

	agent, err := cloud.New(cloud.Config{
		URL: c.server, Token: s.token, State: state, Name: s.name, Version: w.version,
		Pools:        offer(ctx, s.pools, provider, store, emulation),
		MachineFiles: machineFiles,
		Synced: func() {
			log.InfoContext(ctx, "ready", "server", c.server, "pools", len(s.pools), "agent", s.name)
		},
		Log: log,
	})
	if err != nil {
		return err
	}
	return serve(ctx, agent, relay, health, w.version)
}

// serve runs the agent, its relay and its health page until one of them fails
// or ctx ends.
func serve(ctx context.Context, agent *cloud.Agent, relay *cloud.Relay, health net.Listener, version string) error {
	sockets, err := relay.Listen(ctx)
	if err != nil {
		return err
	}
	tasks := []func(context.Context) error{
		agent.Run,
		func(ctx context.Context) error { return relay.Serve(ctx, sockets) },
		func(ctx context.Context) error { return serveHealth(ctx, health, agent.Status, version) },
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make([]error, len(tasks))
	var wg sync.WaitGroup
	for i, task := range tasks {
		wg.Go(func() {
			defer cancel() // one for all
			errs[i] = task(ctx)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// openLocal opens the provider of this host's machines.
func openLocal(ctx context.Context, c cloudConfig, s settings, store *btrfs.Store, relayDir string, log *slog.Logger) (*local.Provider, error) {
	servers, err := addresses(ctx, s.server)
	if err != nil {
		return nil, err
	}
	advertise := c.advertise
	if advertise == "" {
		if advertise, err = towards(ctx, s.server); err != nil {
			return nil, err
		}
	}
	return local.Open(ctx, local.Config{
		State: filepath.Join(c.stateDir, "local"), Run: filepath.Join(c.runDir, "local"), Binaries: s.binDir,
		OpenVolume: local.Volumes(store.Open),
		Advertise:  advertise, Listen: c.listen, FirstPort: s.firstPort, LastPort: s.lastPort,
		Network: s.network, Allow: s.allow, Deny: servers,
		Relay: relayDir, Nameservers: s.dns, Authorities: c.authorities, Runc: c.runc, Log: log,
	})
}

// addresses are those of the control plane, which machines reach through the
// relay alone.
func addresses(ctx context.Context, server string) ([]netip.Prefix, error) {
	host, _, err := net.SplitHostPort(server)
	if err != nil {
		return nil, fmt.Errorf("--server: %w", err)
	}
	found, err := new(net.Resolver).LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("--server: find the address of %q, which machines must not reach: %w", host, err)
	}
	prefixes := make([]netip.Prefix, len(found))
	for i, a := range found {
		prefixes[i] = netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen())
	}
	return prefixes, nil
}

// towards is this host's address on the way to the server. No packet is sent.
func towards(ctx context.Context, server string) (string, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "udp", server)
	if err != nil {
		return "", fmt.Errorf("find this host's address towards %s: %w; give --advertise-address", server, err)
	}
	defer conn.Close() //nolint:errcheck // nothing was sent
	host, _, err := net.SplitHostPort(conn.LocalAddr().String())
	return host, err
}

// offer makes the pools that the control plane is told of.
func offer(ctx context.Context, pools []poolConfig, provider *local.Provider, store *btrfs.Store, emulation emulation) []cloud.Pool {
	offered := make([]cloud.Pool, len(pools))
	for i, p := range pools {
		offered[i] = cloud.Pool{
			Name: p.name, Kind: "local", Arch: p.arch, Emulated: p.emulated, MaxMachines: p.max,
			CPUs: runtime.NumCPU(), MemoryBytes: memory(),
			Warnings: store.Warnings(),
			Closed:   func() string { return full(ctx, store) },
			Provider: provider, Volumes: store,
		}
		if p.emulated {
			offered[i].Warnings = append(offered[i].Warnings, emulation.warning(p.arch))
		}
	}
	return offered
}

// memory is the host's, in bytes; 0 if the kernel does not say.
func memory() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0
	}
	return int64(info.Totalram) * int64(info.Unit) //nolint:gosec // no host has 2^63 bytes
}

// full says that volumes have no room for another machine's work: less than a
// twentieth of the store is free.
func full(ctx context.Context, store *btrfs.Store) string {
	u, err := store.Usage(ctx)
	switch {
	case err != nil:
		return "its volumes cannot be measured: " + err.Error()
	case u.Free < u.Size/20:
		return fmt.Sprintf("its volumes have %d MiB of %d MiB left: shrink or remove projects' caches, or make room on the disk", u.Free>>20, u.Size>>20)
	}
	return ""
}

// machineFiles are what a machine finds in /run/depot besides its token.
func machineFiles(m cloud.MachineInfo) (map[string][]byte, error) {
	text, err := json.MarshalIndent(machine.Config{
		MachineID: m.ID, ServerID: m.ServerID, Arch: m.Arch,
		ControlPlane: machine.ControlPlane{URL: m.URL, Pin: m.Pin},
	}, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("make machine.json: %w", err)
	}
	return map[string][]byte{"machine.json": text}, nil
}
