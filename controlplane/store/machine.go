package store

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/opendepot/depot/controlplane"
)

// machineActive selects the machines that are not over or not gone. It is the
// condition of the indexes machines_scope and machines_agent, word for word.
const machineActive = "(gone IS NULL OR state NOT IN ('stopped', 'failed'))"

func machines() table[controlplane.Machine] {
	return table[controlplane.Machine]{
		name: "machines", noun: "machine", key: "id",
		columns: func(m *controlplane.Machine) []column {
			return []column{
				{"id", &m.ID},
				{"project", &m.Project},
				{"arch", &m.Arch},
				{"emulated", &m.Emulated},
				{"isolated", &m.Isolated},
				{"agent", &m.Agent},
				{"pool", &m.Pool},
				{"volume", optional{&m.Volume}},
				{"writer_epoch", bits{&m.WriterEpoch}},
				{"generation", optional{&m.Generation}},
				{"cpus", &m.CPUs},
				{"memory_bytes", &m.MemoryBytes},
				{"state", &m.State},
				{"reason", &m.Reason},
				{"now", &m.Now},
				{"key", &m.Key},
				{"address", &m.Address},
				{"created", instant{&m.Created}},
				{"ordered", instant{&m.Ordered}},
				{"launched", instant{&m.Launched}},
				{"ready", instant{&m.Ready}},
				{"idle", instant{&m.Idle}},
				{"draining", instant{&m.Draining}},
				{"ended", instant{&m.Ended}},
				{"gone", instant{&m.Gone}},
				{"seen", instant{&m.Seen}},
				{"usage_at", instant{&m.Usage.At}},
				{"disk_used_bytes", &m.Usage.DiskUsedBytes},
				{"disk_free_bytes", &m.Usage.DiskFreeBytes},
				{"cpu_time", &m.Usage.CPUTime},
				{"memory_used_bytes", &m.Usage.MemoryBytes},
				{"memory_limit_bytes", &m.Usage.MemoryLimitBytes},
				{"buildkit", &m.Buildkit},
				{"warnings", list{&m.Warnings}},
				{"clean", &m.Clean},
			}
		},
	}
}

func (x *tx) Machine(ctx context.Context, id string) (controlplane.Machine, error) {
	return machines().byID(ctx, x, id)
}

func (x *tx) PutMachine(ctx context.Context, m controlplane.Machine) error {
	err := machines().put(ctx, x, &m)
	if x.violation(err) == violatesUnique {
		return x.refuse(err, controlplane.Precondition,
			"volume %s cannot be given to machine %s: another machine still holds it, until its agent reports that one gone", m.Volume, m.ID)
	}
	return err
}

func (x *tx) ScopeMachines(ctx context.Context, s controlplane.Scope) ([]controlplane.Machine, error) {
	return machines().list(ctx, x, "WHERE project = $1 AND arch = $2 AND "+machineActive+" ORDER BY id", s.Project, s.Arch)
}

func (x *tx) AgentMachines(ctx context.Context, agent string) ([]controlplane.Machine, error) {
	return machines().list(ctx, x, "WHERE agent = $1 AND "+machineActive+" ORDER BY id", agent)
}

func (x *tx) Machines(ctx context.Context, f controlplane.MachineFilter) ([]controlplane.Machine, error) {
	var where []string
	var args []any
	add := func(condition string, arg any) {
		args = append(args, arg)
		where = append(where, strings.ReplaceAll(condition, "?", "$"+strconv.Itoa(len(args))))
	}
	if !f.Ended {
		where = append(where, machineActive)
	}
	if f.Org != "" {
		add("project IN (SELECT id FROM projects WHERE org = ?)", f.Org)
	}
	if f.Project != "" {
		add("project = ?", f.Project)
	}
	if f.Before != "" {
		add("id < ?", f.Before)
	}
	rest := ""
	if len(where) > 0 {
		rest = "WHERE " + strings.Join(where, " AND ")
	}
	rest += " ORDER BY id DESC"
	if f.Limit > 0 {
		args = append(args, f.Limit)
		rest += " LIMIT $" + strconv.Itoa(len(args))
	}
	return machines().list(ctx, x, rest, args...)
}

func (x *tx) PoolMachines(ctx context.Context, agent, pool string) (int, error) {
	n := 0
	err := x.row(ctx, "SELECT count(*) FROM machines WHERE agent = $1 AND pool = $2 AND gone IS NULL", []any{agent, pool}, []any{&n})
	if err != nil {
		return 0, fmt.Errorf("count the machines of pool %s: %w", pool, err)
	}
	return n, nil
}
