package cloud

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// call is the hanging call to the control plane.
type call struct {
	report     *depotv1.SyncAgentRequest // of the call that runs; nil: none runs
	cut        context.CancelFunc
	wasCut     bool
	begun      time.Time
	next       time.Time // not before
	failures   int
	said       string // the last failure that was logged
	answeredAt time.Time
	reports    uint64 // sent in this session
	refused    error  // the agent will not obey; see RefusedError
}

// sync keeps one call under way with a true report; it returns when it wants
// to be asked again.
func (l *loop) sync(ctx context.Context, now time.Time) time.Time {
	report := l.report()
	if l.call.report != nil {
		if !l.call.wasCut && (l.outdated || !proto.Equal(report, l.call.report)) {
			l.call.wasCut = true
			l.call.cut()
		}
		return time.Time{}
	}
	if now.Before(l.call.next) {
		return l.call.next
	}
	// Of its own: a call is cut when its report differs from what is seen.
	numbered := proto.CloneOf(report)
	l.call.reports++
	numbered.Sequence = l.call.reports
	callCtx, cut := context.WithCancel(ctx)
	l.call.report, l.call.cut, l.call.wasCut, l.call.begun = report, cut, false, now
	c := l.client
	l.begin(func() func(time.Time) {
		defer cut()
		resp, err := c.Agent.SyncAgent(callCtx, numbered)
		return func(now time.Time) { l.answered(ctx, now, resp, err) }
	})
	return time.Time{}
}

// report is all that is seen.
func (l *loop) report() *depotv1.SyncAgentRequest {
	r := &depotv1.SyncAgentRequest{
		SessionId: l.session, ServerId: l.obeys.ServerID, Epoch: l.obeys.Epoch,
		HaveRevision: l.orders.GetRevision(), Version: l.cfg.Version,
	}
	for _, b := range l.backends {
		for _, p := range b.pools {
			r.Pools = append(r.Pools, b.report(p))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(l.machines)) {
		m := l.machines[id]
		if o := m.report(l.volumeOf(m), l.foreignMachine(m)); o != nil {
			r.Machines = append(r.Machines, o)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(l.volumes)) {
		v := l.volumes[id].seen
		if v == nil || l.foreign(v.Labels) {
			continue
		}
		o := &depotv1.ObservedVolume{Id: id, WriterEpoch: v.WriterEpoch, Writer: v.Writer, Busy: v.Busy}
		for _, g := range v.Generations {
			o.Generations = append(o.Generations, g.ID)
		}
		r.Volumes = append(r.Volumes, o)
	}
	return r
}

func (b *backend) report(p Pool) *depotv1.Pool {
	r := &depotv1.Pool{
		Name: p.Name, Provider: p.Kind, Arch: p.Arch, Emulated: p.Emulated,
		MaxMachines: int32(p.MaxMachines), //nolint:gosec // a count of machines
		Isolated:    p.Isolated,
		Cpus:        int32(p.CPUs), //nolint:gosec // a count of processors
		MemoryBytes: p.MemoryBytes, Warnings: p.Warnings,
	}
	switch {
	case b.err != nil:
		r.Closed = "its machines cannot be looked at: " + b.err.Error()
	case p.Closed != nil:
		r.Closed = p.Closed()
	}
	return r
}

// answered takes over the answer of the call that ran.
func (l *loop) answered(ctx context.Context, now time.Time, resp *depotv1.SyncAgentResponse, err error) {
	c := &l.call
	c.report = nil
	if l.outdated {
		l.outdated = false
		err = errors.Join(err, l.reconnect())
	}
	if err == nil {
		err = l.accept(resp)
	}
	switch {
	case ctx.Err() != nil:
		return
	case err == nil:
		l.obey(ctx, now, resp)
	case c.wasCut && errors.Is(err, context.Canceled):
		c.next = now
	default:
		l.unanswered(ctx, now, err)
	}
}

// accept refuses to obey anyone but the control plane that was joined, and
// that one only in its newest state. What is accepted is stored first.
func (l *loop) accept(resp *depotv1.SyncAgentResponse) error {
	known := l.obeys
	switch {
	case resp.GetServerId() != known.ServerID:
		return l.Agent.foreign(resp.GetServerId())
	case resp.GetEpoch() < known.Epoch:
		return &RefusedError{fmt.Sprintf("the control plane at %s is in its epoch %d, but this agent has obeyed epoch %d: it was restored "+
			"from an older copy of its state, or is a second one on a copy; see `depot-controlplane recover` about raising the epoch of the right one",
			l.client.URL(), resp.GetEpoch(), known.Epoch)}
	case resp.GetEpoch() == known.Epoch:
		return nil
	}
	known.Epoch = resp.GetEpoch()
	if err := l.state.setControlPlane(known); err != nil {
		return err
	}
	l.obeys = known
	return nil
}

// obey makes resp the orders.
func (l *loop) obey(ctx context.Context, now time.Time, resp *depotv1.SyncAgentResponse) {
	c := &l.call
	if c.failures > 0 {
		l.log.InfoContext(ctx, "connected to the control plane again")
	}
	c.failures, c.said, c.answeredAt, c.next = 0, "", now, now
	if resp.GetRevision() == l.orders.GetRevision() && now.Sub(c.begun) < time.Second && l.orders != nil {
		c.next = c.begun.Add(time.Second) // nothing new so soon: do not spin
	}
	first := l.orders == nil
	l.orders = resp
	named := map[string]*depotv1.MachineOrder{}
	for _, o := range resp.GetMachines() {
		if !validID("mch", o.GetId()) {
			l.log.ErrorContext(ctx, "ordered machine has no valid id", "machine", o.GetId())
			continue
		}
		named[o.GetId()] = o
		l.know(o.GetId())
	}
	for id, m := range l.machines {
		if !proto.Equal(m.order, named[id]) {
			m.order, m.try = named[id], attempts{}
		}
		l.forget(m)
	}
	if first && l.cfg.Synced != nil {
		l.cfg.Synced()
	}
}

// unanswered notes a failed call. What it says is logged when it changes: an
// hour without a control plane is one line, not a thousand.
func (l *loop) unanswered(ctx context.Context, now time.Time, err error) {
	c := &l.call
	if refused := (*RefusedError)(nil); errors.As(err, &refused) && l.orders == nil {
		c.refused = refused
		return
	}
	if c.said != err.Error() {
		c.said = err.Error()
		switch {
		case connect.CodeOf(err) == connect.CodeAlreadyExists:
			l.log.WarnContext(ctx, "another session of this agent is connected", "err", err)
		case retryable(err):
			l.log.WarnContext(ctx, "the control plane is away; machines run on", "err", err)
		default:
			l.log.ErrorContext(ctx, "the control plane refuses this agent; machines run on", "err", err)
		}
	}
	most := callWait
	if connect.CodeOf(err) == connect.CodeAlreadyExists {
		most = takeoverWait
	}
	c.next = now.Add(backoff(c.failures, most, jitter()))
	c.failures++
}
