package cloud

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/opendepot/depot/agent/provider"
)

// host is a cloud in memory: it outlives agents, and counts what they do.
type host struct {
	mu       sync.Mutex
	machines map[string]*provider.Instance
	specs    map[string]provider.MachineSpec
	volumes  map[string]*provider.Volume
	started  map[string]int // how often a machine's PID 1 was started
	stops    map[string]int
	acts     []string // in order
	// fail makes the next calls of that name fail; hang makes them wait.
	fail map[string]error
	hang map[string]chan struct{}
}

func newHost() *host {
	return &host{
		machines: map[string]*provider.Instance{}, specs: map[string]provider.MachineSpec{}, volumes: map[string]*provider.Volume{},
		started: map[string]int{}, stops: map[string]int{}, fail: map[string]error{}, hang: map[string]chan struct{}{},
	}
}

// enter begins a call; it returns with the lock held.
func (h *host) enter(ctx context.Context, call string) error {
	h.mu.Lock()
	if hang := h.hang[call]; hang != nil {
		h.mu.Unlock()
		select {
		case <-hang:
		case <-ctx.Done():
			h.mu.Lock()
			return ctx.Err()
		}
		h.mu.Lock()
	}
	return h.fail[call]
}

func (h *host) Launch(ctx context.Context, spec provider.MachineSpec) (provider.Instance, error) {
	err := h.enter(ctx, "launch")
	defer h.mu.Unlock()
	if err != nil {
		return provider.Instance{}, err
	}
	if m := h.machines[spec.ID]; m != nil {
		return *m, nil
	}
	v := h.volumes[spec.Volume]
	switch {
	case v == nil:
		return provider.Instance{}, provider.ErrNotFound
	case v.Busy:
		return provider.Instance{}, provider.ErrVolumeBusy
	case spec.WriterEpoch < v.WriterEpoch:
		return provider.Instance{}, provider.ErrStaleWriter
	}
	v.Busy, v.Writer, v.WriterEpoch = true, spec.ID, spec.WriterEpoch
	h.started[spec.ID]++
	h.specs[spec.ID] = spec
	h.machines[spec.ID] = &provider.Instance{
		ID: spec.ID, Volume: spec.Volume, State: provider.Running, Address: "192.0.2.1:24000", Labels: maps.Clone(spec.Labels), Launched: time.Now(),
	}
	h.acts = append(h.acts, "launch")
	return *h.machines[spec.ID], nil
}

func (h *host) Stop(ctx context.Context, id string) error {
	err := h.enter(ctx, "stop")
	defer h.mu.Unlock()
	h.stops[id]++
	if h.machines[id] == nil {
		return provider.ErrNotFound
	}
	return err
}

func (h *host) Destroy(ctx context.Context, id string) error {
	err := h.enter(ctx, "destroy")
	defer h.mu.Unlock()
	if m := h.machines[id]; m != nil && err == nil {
		if m.State == provider.Running {
			h.volumes[m.Volume].Busy = false
		}
		delete(h.machines, id)
		h.acts = append(h.acts, "destroy")
	}
	return err
}

func (h *host) List(ctx context.Context) ([]provider.Instance, error) {
	err := h.enter(ctx, "list")
	defer h.mu.Unlock()
	var all []provider.Instance
	for _, m := range h.machines {
		all = append(all, *m)
	}
	return all, err
}

// exit ends a machine from within.
func (h *host) exit(id string, how provider.Exit) {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.machines[id]
	m.State, m.Exit = provider.Exited, &how
	h.volumes[m.Volume].Busy = false
}

// reboot loses all that is not on a disk, records of machines included.
func (h *host) reboot() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.machines {
		h.volumes[m.Volume].Busy = false
	}
	clear(h.machines)
}

func (h *host) set(change func(*host)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change(h)
}

func look[T any](h *host, read func(*host) T) T {
	h.mu.Lock()
	defer h.mu.Unlock()
	return read(h)
}

// disk is the volume store of a host.
type disk struct{ *host }

func (d disk) Ensure(ctx context.Context, spec provider.VolumeSpec) (provider.Volume, error) {
	err := d.enter(ctx, "ensure")
	defer d.mu.Unlock()
	if err != nil {
		return provider.Volume{}, err
	}
	if d.volumes[spec.ID] == nil {
		d.volumes[spec.ID] = &provider.Volume{ID: spec.ID, Labels: spec.Labels}
	}
	return *d.volumes[spec.ID], nil
}

func (d disk) Commit(ctx context.Context, volume, generation string) (provider.Generation, error) {
	err := d.enter(ctx, "commit")
	defer d.mu.Unlock()
	v := d.volumes[volume]
	if v == nil {
		err = errors.Join(err, provider.ErrNotFound)
	}
	if err != nil {
		return provider.Generation{}, err
	}
	g := provider.Generation{ID: generation, Committed: time.Now()}
	if !slices.ContainsFunc(v.Generations, func(g provider.Generation) bool { return g.ID == generation }) {
		v.Generations = append(slices.Clip(v.Generations), g)
		d.acts = append(d.acts, "commit")
	}
	return g, nil
}

func (d disk) DeleteGeneration(ctx context.Context, volume, generation string) error {
	err := d.enter(ctx, "delete_generation")
	defer d.mu.Unlock()
	if v := d.volumes[volume]; v != nil && err == nil {
		v.Generations = slices.DeleteFunc(slices.Clone(v.Generations), func(g provider.Generation) bool { return g.ID == generation })
	}
	return err
}

func (d disk) Delete(ctx context.Context, volume string) error {
	err := d.enter(ctx, "delete")
	defer d.mu.Unlock()
	if v := d.volumes[volume]; v != nil && v.Busy {
		return provider.ErrVolumeBusy
	}
	if err == nil {
		delete(d.volumes, volume)
	}
	return err
}

func (d disk) List(ctx context.Context) ([]provider.Volume, error) {
	err := d.enter(ctx, "list_volumes")
	defer d.mu.Unlock()
	var all []provider.Volume
	for _, v := range d.volumes {
		all = append(all, *v)
	}
	return all, err
}
