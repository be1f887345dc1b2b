package cloud

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/opendepot/depot/agent/provider"
)

// actTimeout ends an act that hangs, whatever it is.
const actTimeout = 10 * time.Minute

// stepMachine starts the next act on m, if one is due and there is room.
func (l *loop) stepMachine(ctx context.Context, now time.Time, m *machine) time.Time {
	a, again := m.decide(now, l.volumeOf(m), l.foreignMachine(m))
	if a == none {
		return again
	}
	v := l.volume(m.volumeID())
	if l.acting >= actsAtOnce || v.doing {
		return time.Time{} // the end of an act calls again
	}
	switch a {
	case launch:
		return l.launch(ctx, now, m)
	case stop:
		host := m.host.provider
		l.act(ctx, a, m, func(ctx context.Context) error {
			if err := l.state.note(m.id, stopping); err != nil {
				return err
			}
			if err := host.Stop(ctx, m.id); !errors.Is(err, provider.ErrNotFound) {
				return err
			}
			return nil // it is gone, as wanted
		}, func() { l.noted(m, stopping) })
	case commit:
		store, volume, generation := m.host.volumes, m.seen.Volume, m.seen.Labels[labelGeneration]
		var made provider.Generation
		l.act(ctx, a, m, func(ctx context.Context) (err error) {
			made, err = store.Commit(ctx, volume, generation)
			return err
		}, func() {
			seen := *v.seen
			seen.Generations = append(slices.Clip(seen.Generations), made)
			v.seen = &seen
		})
	case bury:
		l.act(ctx, a, m, func(context.Context) error { return l.state.note(m.id, ended) }, func() { l.noted(m, ended) })
	case destroy:
		hosts := l.backends // of a launch that failed, the rest may be anywhere
		if m.seen != nil {
			hosts = []*backend{m.host}
		}
		l.act(ctx, a, m, func(ctx context.Context) error {
			if err := l.state.note(m.id, ended); err != nil {
				return err
			}
			var errs []error
			for _, b := range hosts {
				errs = append(errs, b.provider.Destroy(ctx, m.id))
			}
			return errors.Join(errs...)
		}, func() {
			l.noted(m, ended)
			m.seen, m.destroyed = nil, true
		})
	default:
	}
	return time.Time{}
}

// launch makes sure of the volume and launches m.
func (l *loop) launch(ctx context.Context, now time.Time, m *machine) time.Time {
	order := m.order.GetLaunch()
	host, pool, err := l.place(m)
	if err != nil {
		m.try.failed(now, err, callWait, jitter())
		m.try.final = errors.Is(err, provider.ErrUnusable)
		return m.try.next
	}
	info := l.machineInfo(m.id, order, pool)
	labels := map[string]string{
		labelServer: l.obeys.ServerID, labelAgent: l.obeys.AgentID, labelProject: order.GetProjectId(), labelArch: order.GetArch(),
	}
	volume := provider.VolumeSpec{ID: order.GetVolumeId(), Labels: labels}
	spec := provider.MachineSpec{
		ID: m.id, Arch: order.GetArch(), Volume: order.GetVolumeId(), WriterEpoch: order.GetWriterEpoch(),
		CPUs: int(order.GetCpus()), MemoryBytes: order.GetMemoryBytes(),
		Labels: map[string]string{
			labelMachine: m.id, labelVolume: order.GetVolumeId(), labelGeneration: order.GetGenerationId(), labelPool: pool.Name,
		},
	}
	maps.Copy(spec.Labels, labels)
	var instance provider.Instance
	var made provider.Volume
	l.act(ctx, launch, m, func(ctx context.Context) (err error) {
		if spec.Files, err = l.cfg.MachineFiles(info); err != nil {
			return err
		}
		spec.Files["join-token"] = []byte(order.GetJoinToken())
		if err := l.state.note(m.id, launching); err != nil {
			return err
		}
		if made, err = host.volumes.Ensure(ctx, volume); err != nil {
			return err
		}
		if instance, err = host.provider.Launch(ctx, spec); err != nil {
			return err
		}
		return l.state.note(m.id, launched)
	}, func() {
		l.noted(m, launched)
		m.seen, m.host = &instance, host
		made.Writer, made.WriterEpoch, made.Busy = m.id, max(made.WriterEpoch, spec.WriterEpoch), instance.State == provider.Running
		v := l.volume(made.ID)
		v.seen, v.host, v.settled = &made, host, l.listing
	})
	return time.Time{}
}

// place finds the pool of an order, and whether it may run there. ErrUnusable
// means that it never will.
func (l *loop) place(m *machine) (*backend, Pool, error) {
	order := m.order.GetLaunch()
	refuse := func(format string, args ...any) (*backend, Pool, error) {
		return nil, Pool{}, fmt.Errorf("%w: %s", provider.ErrUnusable, fmt.Sprintf(format, args...))
	}
	switch {
	case !validID("vol", order.GetVolumeId()):
		return refuse("the order names no valid volume: %q", order.GetVolumeId())
	case !validID("gen", order.GetGenerationId()):
		return refuse("the order names no valid generation: %q", order.GetGenerationId())
	case order.GetCpus() < 0 || order.GetMemoryBytes() < 0:
		return refuse("the order's limits are negative")
	}
	if v := l.volumes[order.GetVolumeId()]; v != nil && v.seen != nil && l.foreign(v.seen.Labels) {
		return refuse("the volume %s on this host belongs to another control plane", order.GetVolumeId())
	}
	var names []string
	for _, b := range l.backends {
		for _, p := range b.pools {
			names = append(names, p.Name)
			if p.Name != order.GetPool() {
				continue
			}
			if p.Arch != order.GetArch() {
				return refuse("pool %q is for %s, not for %s", p.Name, p.Arch, order.GetArch())
			}
			if n := l.inPool(p.Name); n >= p.MaxMachines {
				return nil, p, fmt.Errorf("%w: pool %q runs %d of at most %d machines", provider.ErrNoCapacity, p.Name, n, p.MaxMachines)
			}
			return b, p, nil
		}
	}
	return refuse("this agent has no pool %q: it has %s", order.GetPool(), strings.Join(names, ", "))
}

// inPool counts the machines that use the pool's room now.
func (l *loop) inPool(name string) int {
	n := 0
	for _, m := range l.machines {
		if m.running() && m.seen.Labels[labelPool] == name || m.doing == launch && m.order.GetLaunch().GetPool() == name {
			n++
		}
	}
	return n
}

// act does a to m, and applies done if it succeeded.
func (l *loop) act(ctx context.Context, a act, m *machine, do func(context.Context) error, done func()) {
	v := l.volume(m.volumeID())
	holds := a != stop && a != bury
	m.doing, v.doing = a, holds
	l.perform(ctx, a, m.id, do, func(now time.Time, err error) {
		m.doing, m.settled = none, l.listing
		if holds {
			v.doing, v.settled = false, l.listing
		}
		tries, most := &m.try, callWait
		switch a {
		case commit:
			tries = &m.commits
		case destroy:
			most = actWait
		default:
		}
		if err != nil {
			tries.failed(now, err, most, jitter())
			tries.final = a == launch && (errors.Is(err, provider.ErrStaleWriter) || errors.Is(err, provider.ErrUnusable))
			return
		}
		*tries = attempts{}
		if done != nil {
			done()
		}
	})
}

// perform runs an act on the object of that id; the loop applies then. A
// started act is not cut by the end of ctx, but by that of a grace after it.
func (l *loop) perform(ctx context.Context, a act, object string, do func(context.Context) error, then func(time.Time, error)) {
	l.acting++
	l.begin(func() func(time.Time) {
		late, cancel := outlive(ctx, stopGrace)
		defer cancel()
		late, cancelLate := context.WithTimeout(late, actTimeout)
		defer cancelLate()
		err := do(late)
		return func(now time.Time) {
			l.acting--
			l.counts[a]++
			// What was done shows in the next listing, and may be more than asked.
			l.nextList, l.nextVolumes = now, time.Time{}
			if err != nil {
				l.failures[a]++
				l.log.WarnContext(ctx, "act", "act", string(a), "object", object, "err", err)
			} else {
				l.log.InfoContext(ctx, "act", "act", string(a), "object", object)
			}
			then(now, err)
		}
	})
}

// outlive returns a context that ends a grace after ctx does.
func outlive(ctx context.Context, grace time.Duration) (context.Context, context.CancelFunc) {
	late, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		wait(late, grace)
		cancel()
	})
	return late, func() { stop(); cancel() }
}

// noted keeps what the ledger on disk says of m.
func (l *loop) noted(m *machine, record launchRecord) { m.noted, l.ledger[m.id] = record, record }
