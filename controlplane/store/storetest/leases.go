package storetest

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/opendepot/depot/controlplane"
)

func leaseOrder(t *testing.T, s controlplane.Store) {
	t.Helper()
	const clients, each = 8, 5
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			last := int64(0)
			for i := range each {
				var l controlplane.Lease
				err := s.Update(t.Context(), func(tx controlplane.Tx) (err error) {
					l, err = tx.PutLease(t.Context(), controlplane.Lease{ID: fmt.Sprintf("lse_%d_%d", c, i), Project: "prj_1", Arch: "amd64", State: controlplane.LeaseWaiting})
					return err
				})
				if err != nil || l.Seq <= last {
					t.Errorf("got seq %d after %d, and error %v", l.Seq, last, err)
				}
				last = l.Seq
			}
		})
	}
	wg.Wait()
	update(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		all, err := tx.LiveLeases(ctx, controlplane.Scope{Project: "prj_1", Arch: "amd64"})
		if err != nil {
			return err
		}
		seqs := make([]int64, len(all))
		for i, l := range all {
			seqs[i] = l.Seq
		}
		if len(all) != clients*each || !slices.IsSorted(seqs) || len(slices.Compact(seqs)) != len(all) {
			t.Errorf("got %d leases with the order %v", len(all), seqs)
		}
		// A known lease keeps its place, whatever its writer says.
		first := all[0]
		first.Seq, first.Reason = 0, "changed"
		got, err := tx.PutLease(ctx, first)
		same(t, "place of a known lease", got.Seq, seqs[0])
		same(t, "reason", got.Reason, "changed")
		return err
	})
}

func scopeLeases(t *testing.T, s controlplane.Store) {
	t.Helper()
	put(t, s,
		controlplane.Lease{ID: "lse_c", Project: "prj_1", Arch: "amd64", State: controlplane.LeaseWaiting, Principal: "tok_1"},
		controlplane.Lease{ID: "lse_b", Project: "prj_1", Arch: "amd64", State: controlplane.LeaseEnded, Principal: "tok_1"},
		controlplane.Lease{ID: "lse_a", Project: "prj_1", Arch: "amd64", State: controlplane.LeaseReady, Principal: "tok_2"},
		controlplane.Lease{ID: "lse_d", Project: "prj_1", Arch: "arm64", State: controlplane.LeaseReady, Principal: "tok_1"},
		controlplane.Lease{ID: "lse_e", Project: "prj_2", Arch: "amd64", State: controlplane.LeaseReady, Principal: "tok_1"},
	)
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		all, err := tx.LiveLeases(ctx, controlplane.Scope{Project: "prj_1", Arch: "amd64"})
		check(t, "of a scope", all, err, leaseID, "lse_c", "lse_a")
		all, err = tx.LiveLeases(ctx, controlplane.Scope{Project: "prj_3", Arch: "amd64"})
		check(t, "of no scope", all, err, leaseID)
		n, err := tx.ScopeLeases(ctx, controlplane.Scope{Project: "prj_1", Arch: "amd64"})
		if n != 2 || err != nil {
			t.Errorf("counted %d leases of a scope with error %v, want 2", n, err)
		}
		all, err = tx.PrincipalLeases(ctx, "tok_1")
		check(t, "of a principal", all, err, leaseID, "lse_c", "lse_d", "lse_e")
		return nil
	})
}

func machineLeases(t *testing.T, s controlplane.Store) {
	t.Helper()
	now := start()
	put(t, s,
		controlplane.Lease{ID: "lse_1", Machine: "mch_1", State: controlplane.LeaseEnded, CertificateUntil: now.Add(time.Nanosecond)},
		controlplane.Lease{ID: "lse_2", Machine: "mch_1", State: controlplane.LeaseReady, CertificateUntil: now.Add(-time.Hour)},
		controlplane.Lease{ID: "lse_3", Machine: "mch_1", State: controlplane.LeaseEnded, CertificateUntil: now},
		controlplane.Lease{ID: "lse_4", Machine: "mch_1", State: controlplane.LeaseEnded},
		controlplane.Lease{ID: "lse_5", Machine: "mch_2", State: controlplane.LeaseReady},
		controlplane.Lease{ID: "lse_6", Machine: "mch_1", State: controlplane.LeaseWaiting},
		controlplane.Lease{ID: "lse_7", State: controlplane.LeaseWaiting},
	)
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		all, err := tx.MachineLeases(ctx, "mch_1", now)
		check(t, "live, or with a valid certificate", all, err, leaseID, "lse_1", "lse_2", "lse_6")
		return nil
	})
}

func queue(t *testing.T, s controlplane.Store) {
	t.Helper()
	lease := func(id, project, arch string, state controlplane.LeaseState, queued bool) controlplane.Lease {
		return controlplane.Lease{ID: id, Project: project, Arch: arch, State: state, Queued: queued}
	}
	put(t, s,
		lease("lse_1", "prj_3", "amd64", controlplane.LeaseWaiting, false),
		lease("lse_2", "prj_4", "amd64", controlplane.LeaseReady, true),
		lease("lse_3", "prj_2", "amd64", controlplane.LeaseWaiting, true),
		lease("lse_4", "prj_5", "arm64", controlplane.LeaseWaiting, true),
		lease("lse_5", "prj_1", "amd64", controlplane.LeaseWaiting, true),
		lease("lse_6", "prj_2", "amd64", controlplane.LeaseWaiting, true),
		lease("lse_7", "prj_0", "amd64", controlplane.LeaseWaiting, true),
	)
	scope := func(s controlplane.Scope) string { return s.String() }
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		all, err := tx.QueuedScopes(ctx, "amd64", 10)
		check(t, "by first lease", all, err, scope, "prj_2/amd64", "prj_1/amd64", "prj_0/amd64")
		all, err = tx.QueuedScopes(ctx, "amd64", 2)
		check(t, "limited", all, err, scope, "prj_2/amd64", "prj_1/amd64")
		return nil
	})
}
