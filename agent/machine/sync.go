package machine

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"connectrpc.com/connect"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// reporter runs the hanging SyncMachine calls: what the machine sees goes up,
// the directive comes down.
type reporter struct {
	session *session
	status  *status
	leases  *leases
	changed *bell
	log     *slog.Logger

	revision uint64    // of the directive that was applied
	answered time.Time // when the control plane last answered
}

// run reports until ctx ends.
func (r *reporter) run(ctx context.Context) {
	r.answered = time.Now()
	for failures := 0; ctx.Err() == nil; {
		began := time.Now()
		err := r.step(ctx)
		wait := coalesce - time.Since(began) // never faster than changes are coalesced
		if err != nil && ctx.Err() == nil {
			r.log.WarnContext(ctx, "report to the control plane", "err", err)
			wait = backoff(failures)
			failures++
		} else {
			failures = 0
		}
		r.checkCutOff(ctx, time.Now())
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// step makes one call. A change of what it reports cuts it, which is no error.
func (r *reporter) step(ctx context.Context) error {
	changed := r.changed.next() // before the report is put together
	report := r.report(r.revision)
	call, cut := context.WithCancel(ctx)
	defer cut()
	stale := make(chan struct{})
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		select {
		case <-call.Done():
			return
		case <-changed:
		}
		// Connections come in bursts; a new state is waited for by somebody.
		if state, _, _ := r.status.get(); state == report.GetState() {
			select {
			case <-call.Done():
				return
			case <-time.After(coalesce):
			}
		}
		close(stale)
		cut()
	}()
	resp, err := r.session.calls().Machine.SyncMachine(call, report)
	cut()
	<-watching
	switch {
	case err == nil:
	case closed(stale):
		return nil
	case connect.CodeOf(err) == connect.CodeNotFound:
		r.answered = time.Now()
		r.status.drain("the control plane does not know this machine", false)
		return err
	default:
		return err
	}
	if err := r.session.accept(resp.GetServerId()); err != nil {
		return err
	}
	r.answered = time.Now()
	return r.apply(resp)
}

// report is what the machine sees now.
func (r *reporter) report(revision uint64) *depotv1.SyncMachineRequest {
	state, reason, version := r.status.get()
	usage, err := sample(r.session.config.Paths, time.Now())
	if err != nil {
		r.log.Warn("measure the machine", "err", err)
	}
	return &depotv1.SyncMachineRequest{
		MachineId:       r.session.config.MachineID,
		HaveRevision:    revision,
		State:           state,
		Reason:          reason,
		Connections:     r.leases.report(),
		Usage:           usage,
		BuildkitVersion: version,
	}
}

// apply obeys a directive: all of it, each time.
func (r *reporter) apply(d *depotv1.SyncMachineResponse) error {
	r.leases.setEnded(d.GetEndedLeases())
	var err error
	if anchors := d.GetTrustAnchors(); len(anchors) > 0 {
		err = r.session.anchors.Replace(anchors)
	}
	if d.GetDrain() {
		r.status.drain("the control plane asked for it", d.GetNow())
	}
	if err == nil {
		r.revision = d.GetRevision()
	}
	return err
}

// checkCutOff drains a machine that nobody uses and nobody answers.
func (r *reporter) checkCutOff(ctx context.Context, now time.Time) {
	if now.Sub(r.answered) >= r.session.config.Times.CutOff && r.leases.connections() == 0 {
		r.log.ErrorContext(ctx, "the control plane has not answered for too long")
		r.status.drain("the control plane has not answered for "+r.session.config.Times.CutOff.String()+" and nothing is built", false)
	}
}

// last reports the end. Without a revision of its own the call is answered at
// once.
func (r *reporter) last(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastReport)
	defer cancel()
	if _, err := r.session.calls().Machine.SyncMachine(ctx, r.report(0)); err != nil && !errors.Is(err, context.Canceled) {
		r.log.WarnContext(ctx, "report the end", "err", err)
	}
}
