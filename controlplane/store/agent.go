package store

import (
	"context"
	"fmt"

	"github.com/opendepot/depot/controlplane"
)

func agents() table[controlplane.Agent] {
	return table[controlplane.Agent]{
		name: "agents", noun: "agent", key: "id",
		columns: func(a *controlplane.Agent) []column {
			return []column{
				{"id", &a.ID},
				{"name", &a.Name},
				{"token", optional{&a.Token}},
				{"key", &a.Key},
				{"session", &a.Session},
				{"connected", &a.Connected},
				{"seen", instant{&a.Seen}},
				{"version", &a.Version},
				{"orphans", list{&a.Orphans}},
				{"created", instant{&a.Created}},
			}
		},
	}
}

func (x *tx) Agent(ctx context.Context, id string) (controlplane.Agent, error) {
	return agents().byID(ctx, x, id)
}

func (x *tx) Agents(ctx context.Context) ([]controlplane.Agent, error) {
	return agents().list(ctx, x, "ORDER BY name, id")
}

func (x *tx) PutAgent(ctx context.Context, a controlplane.Agent) error {
	return agents().put(ctx, x, &a)
}

// DeleteAgent deletes an agent and its pools.
func (x *tx) DeleteAgent(ctx context.Context, id string) error {
	return agents().remove(ctx, x, id)
}

func pools() table[controlplane.Pool] {
	return table[controlplane.Pool]{
		name: "pools", noun: "pool", key: "agent, name",
		columns: func(p *controlplane.Pool) []column {
			return []column{
				{"agent", &p.Agent},
				{"name", &p.Name},
				{"provider", &p.Provider},
				{"arch", &p.Arch},
				{"emulated", &p.Emulated},
				{"max_machines", &p.MaxMachines},
				{"isolated", &p.Isolated},
				{"cpus", &p.CPUs},
				{"memory_bytes", &p.MemoryBytes},
				{"warnings", list{&p.Warnings}},
				{"closed", &p.Closed},
			}
		},
	}
}

func (x *tx) Pools(ctx context.Context, arch string) ([]controlplane.Pool, error) {
	if arch == "" {
		return pools().list(ctx, x, "ORDER BY agent, name")
	}
	return pools().list(ctx, x, "WHERE arch = $1 ORDER BY agent, name", arch)
}

// PutPools replaces an agent's pools; whatever agent they name, it is this one.
func (x *tx) PutPools(ctx context.Context, agent string, all []controlplane.Pool) error {
	if _, err := x.exec(ctx, "DELETE FROM pools WHERE agent = $1", agent); err != nil {
		return fmt.Errorf("replace the pools of agent %s: %w", agent, err)
	}
	for _, p := range all {
		p.Agent = agent
		err := pools().put(ctx, x, &p)
		if x.violation(err) == violatesReference {
			return x.refuse(err, controlplane.NotFound, "agent %q does not exist", agent)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
