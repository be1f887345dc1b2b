package server_test

import (
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// crowdSize is how many leases the control plane has to serve at once.
const crowdSize = 200

// crowd are clients of one project, each with a key and connection of its own.
func crowd(tb testing.TB, cp *controlPlane, token string) []*driver {
	tb.Helper()
	drivers := make([]*driver, crowdSize)
	for i := range drivers {
		drivers[i] = cp.driver(tb, token)
	}
	return drivers
}

// acquireAll has all ask at once, and returns how long each waited and which
// machines they got.
func acquireAll(tb testing.TB, drivers []*driver) func() ([]time.Duration, []string) {
	tb.Helper()
	waited, machines := make([]time.Duration, len(drivers)), make([]string, len(drivers))
	var g errgroup.Group
	for i, d := range drivers {
		g.Go(func() error {
			begin := time.Now()
			resp, err := d.acquire(tb.Context())
			waited[i], machines[i] = time.Since(begin), resp.GetEndpoint().GetMachineId()
			return err
		})
	}
	return func() ([]time.Duration, []string) {
		tb.Helper()
		must(tb, g.Wait())
		return waited, machines
	}
}

// TestLeases200 has 200 clients of one project ask at once, with no machine
// there yet: they share one.
func TestLeases200(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(3))
	drivers := crowd(t, cp, token)
	wait := acquireAll(t, drivers)
	m := a.serve(t)
	_, machines := wait()
	slices.Sort(machines)
	if got := slices.Compact(machines); !slices.Equal(got, []string{m.id}) {
		t.Errorf("the leases are on the machines %q, want %s alone", got, m.id)
	}
	if orders := a.sync(t); len(orders.GetMachines()) != 1 {
		t.Errorf("%d machines were ordered", len(orders.GetMachines()))
	}
	got, err := cp.admin(t).Admin.GetMachine(t.Context(), &depotv1.GetMachineRequest{Id: m.id})
	must(t, err)
	if got.GetMachine().GetLeases() != crowdSize || len(got.GetLeases()) != crowdSize {
		t.Errorf("the machine has %d leases, %d listed", got.GetMachine().GetLeases(), len(got.GetLeases()))
	}
}

// BenchmarkLeases200 reports how long the slowest of 200 clients that ask at
// once wait for their certificate, on a machine that is ready.
func BenchmarkLeases200(b *testing.B) {
	cp := newControlPlane(b)
	_, token := cp.project(b, "web", nil)
	a := cp.agent(b, "host-1", pool(1))
	drivers := crowd(b, cp, token)
	wait := acquireAll(b, drivers[:1])
	a.serve(b)
	wait()
	var all []time.Duration
	for b.Loop() {
		b.StopTimer()
		for _, d := range drivers {
			d.release(b)
			d.renew(b)
		}
		b.StartTimer()
		waited, _ := acquireAll(b, drivers)()
		all = append(all, waited...)
	}
	slices.Sort(all)
	b.ReportMetric(float64(all[len(all)*99/100].Milliseconds()), "p99-ms")
	b.ReportMetric(float64(all[len(all)/2].Milliseconds()), "p50-ms")
}
