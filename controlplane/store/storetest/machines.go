package storetest

import (
	"context"
	"testing"
	"time"

	"github.com/opendepot/depot/controlplane"
)

func oneWriter(t *testing.T, s controlplane.Store) {
	t.Helper()
	first := controlplane.Machine{ID: "mch_1", Volume: "vol_1", State: controlplane.MachineReady}
	second := controlplane.Machine{ID: "mch_2", Volume: "vol_1", State: controlplane.MachinePending}
	steal := func(ctx context.Context, tx controlplane.Tx) error { return tx.PutMachine(ctx, second) }
	put(t, s, first)
	refused(t, s, controlplane.Precondition, "vol_1", steal)
	// Failed is what the control plane thinks; gone is what the agent saw.
	first = first.Fail(start(), "its agent is silent")
	put(t, s, first)
	refused(t, s, controlplane.Precondition, "vol_1", steal)
	first.Gone = start().Add(time.Hour)
	put(t, s, first, second)
	// Nor can the old writer come back, or another machine change to the volume.
	first.Gone = time.Time{}
	refused(t, s, controlplane.Precondition, "vol_1", func(ctx context.Context, tx controlplane.Tx) error { return tx.PutMachine(ctx, first) })
	put(t, s, controlplane.Machine{ID: "mch_3", Volume: "vol_2"})
	refused(t, s, controlplane.Precondition, "vol_1", func(ctx context.Context, tx controlplane.Tx) error {
		return tx.PutMachine(ctx, controlplane.Machine{ID: "mch_3", Volume: "vol_1"})
	})
	// Machines without a volume hold none.
	put(t, s, controlplane.Machine{ID: "mch_4"}, controlplane.Machine{ID: "mch_5"})
}

// fleet are machines of one scope, agent and pool in each kind of state, and
// one of another of each.
func fleet() []any {
	gone := start()
	return []any{
		controlplane.Organization{ID: "org_1", Name: "acme"},
		controlplane.Organization{ID: "org_2", Name: "other"},
		controlplane.Project{ID: "prj_1", Org: "org_1", Name: "web"},
		controlplane.Project{ID: "prj_2", Org: "org_2", Name: "web"},
		controlplane.Machine{ID: "mch_1", Project: "prj_1", Arch: "amd64", Agent: "agt_1", Pool: "a", State: controlplane.MachineReady},
		controlplane.Machine{ID: "mch_2", Project: "prj_1", Arch: "amd64", Agent: "agt_1", Pool: "a", State: controlplane.MachineStopped, Gone: gone},
		controlplane.Machine{ID: "mch_3", Project: "prj_1", Arch: "amd64", Agent: "agt_1", Pool: "a", State: controlplane.MachineFailed},
		controlplane.Machine{ID: "mch_4", Project: "prj_1", Arch: "amd64", Agent: "agt_1", Pool: "a", State: controlplane.MachineDraining, Gone: gone},
		controlplane.Machine{ID: "mch_5", Project: "prj_1", Arch: "arm64", Agent: "agt_1", Pool: "b", State: controlplane.MachinePending},
		controlplane.Machine{ID: "mch_6", Project: "prj_2", Arch: "amd64", Agent: "agt_2", Pool: "a", State: controlplane.MachineStarting},
		controlplane.Machine{ID: "mch_7", Project: "prj_2", Arch: "amd64", Agent: "agt_2", Pool: "a", State: controlplane.MachineFailed, Gone: gone},
	}
}

func activeMachines(t *testing.T, s controlplane.Store) {
	t.Helper()
	put(t, s, fleet()...)
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		all, err := tx.ScopeMachines(ctx, controlplane.Scope{Project: "prj_1", Arch: "amd64"})
		check(t, "of a scope", all, err, machineID, "mch_1", "mch_3", "mch_4")
		all, err = tx.AgentMachines(ctx, "agt_1")
		check(t, "of an agent", all, err, machineID, "mch_1", "mch_3", "mch_4", "mch_5")
		n, err := tx.PoolMachines(ctx, "agt_1", "a")
		same(t, "room taken in a pool", n, 2)
		return err
	})
}

func machinePages(t *testing.T, s controlplane.Store) {
	t.Helper()
	put(t, s, fleet()...)
	tests := map[string]struct {
		filter controlplane.MachineFilter
		want   []string
	}{
		"active":          {controlplane.MachineFilter{}, []string{"mch_6", "mch_5", "mch_4", "mch_3", "mch_1"}},
		"all":             {controlplane.MachineFilter{Ended: true}, []string{"mch_7", "mch_6", "mch_5", "mch_4", "mch_3", "mch_2", "mch_1"}},
		"first page":      {controlplane.MachineFilter{Ended: true, Limit: 2}, []string{"mch_7", "mch_6"}},
		"next page":       {controlplane.MachineFilter{Ended: true, Limit: 2, Before: "mch_6"}, []string{"mch_5", "mch_4"}},
		"past the end":    {controlplane.MachineFilter{Limit: 2, Before: "mch_1"}, nil},
		"of organization": {controlplane.MachineFilter{Org: "org_2", Ended: true}, []string{"mch_7", "mch_6"}},
		"of project":      {controlplane.MachineFilter{Project: "prj_1", Limit: 2}, []string{"mch_5", "mch_4"}},
		"of both":         {controlplane.MachineFilter{Org: "org_2", Project: "prj_1"}, nil},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
				all, err := tx.Machines(ctx, test.filter)
				check(t, "machines", all, err, machineID, test.want...)
				return nil
			})
		})
	}
}

func liveScopes(t *testing.T, s controlplane.Store) {
	t.Helper()
	put(t, s,
		controlplane.Machine{ID: "mch_1", Project: "prj_1", Arch: "amd64", State: controlplane.MachineReady},
		controlplane.Machine{ID: "mch_2", Project: "prj_2", Arch: "amd64", State: controlplane.MachineStopped, Gone: start()},
		controlplane.Machine{ID: "mch_3", Project: "prj_3", Arch: "arm64", State: controlplane.MachineFailed},
		controlplane.Lease{ID: "lse_1", Project: "prj_1", Arch: "amd64", State: controlplane.LeaseReady},
		controlplane.Lease{ID: "lse_2", Project: "prj_4", Arch: "amd64", State: controlplane.LeaseWaiting},
		controlplane.Lease{ID: "lse_3", Project: "prj_5", Arch: "amd64", State: controlplane.LeaseEnded},
	)
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		all, err := tx.LiveScopes(ctx)
		check(t, "live scopes", all, err, controlplane.Scope.String, "prj_1/amd64", "prj_3/arm64", "prj_4/amd64")
		return nil
	})
}
