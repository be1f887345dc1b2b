package cloud

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/opendepot/depot/agent/provider"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// stepVolumes deletes what the orders name, and nothing else.
func (l *loop) stepVolumes(ctx context.Context, now time.Time) time.Time {
	var next time.Time
	soonest := func(t time.Time) {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	for _, id := range l.orders.GetDeleteVolumes() {
		soonest(l.remove(ctx, now, deleteVolume, id, ""))
	}
	for _, ref := range l.orders.GetDeleteGenerations() {
		if !slices.Contains(l.orders.GetDeleteVolumes(), ref.GetVolumeId()) {
			soonest(l.remove(ctx, now, deleteGeneration, ref.GetVolumeId(), ref.GetGenerationId()))
		}
	}
	return next
}

// remove deletes a volume, or a generation of it, if it is there, is ours, and
// can go now.
func (l *loop) remove(ctx context.Context, now time.Time, a act, id, generation string) time.Time {
	v := l.volumes[id]
	if v == nil || v.seen == nil || v.doing || l.foreign(v.seen.Labels) || l.acting >= actsAtOnce {
		return time.Time{}
	}
	isIt := func(g provider.Generation) bool { return g.ID == generation }
	switch {
	case a == deleteGeneration && !slices.ContainsFunc(v.seen.Generations, isIt):
		return time.Time{}
	case a == deleteVolume && l.wanted(id):
		return time.Time{}
	case now.Before(v.try.next):
		return v.try.next
	}
	v.doing = true
	store := v.host.volumes
	l.perform(ctx, a, id, func(ctx context.Context) error {
		if a == deleteVolume {
			return store.Delete(ctx, id)
		}
		return store.DeleteGeneration(ctx, id, generation)
	}, func(now time.Time, err error) {
		v.doing, v.settled = false, l.listing
		switch {
		case errors.Is(err, provider.ErrVolumeBusy):
			v.try.failed(now, err, callWait, jitter())
		case err != nil:
			v.try.failed(now, err, actWait, jitter())
		case a == deleteVolume:
			delete(l.volumes, id)
		default:
			seen := *v.seen
			seen.Generations = slices.DeleteFunc(slices.Clone(seen.Generations), isIt)
			v.seen, v.try = &seen, attempts{}
		}
	})
	return time.Time{}
}

// wanted reports whether a machine has or shall have the volume: an order to
// delete it that crossed one to run on it waits.
func (l *loop) wanted(volume string) bool {
	for _, m := range l.machines {
		if m.volumeID() != volume {
			continue
		}
		if m.running() || m.doing != none || m.seen == nil && m.order.GetAction() == depotv1.MachineOrder_ACTION_RUN && m.noted != ended {
			return true
		}
	}
	return false
}
