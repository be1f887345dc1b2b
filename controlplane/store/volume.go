package store

import (
	"context"

	"github.com/opendepot/depot/controlplane"
)

func volumes() table[controlplane.Volume] {
	return table[controlplane.Volume]{
		name: "volumes", noun: "volume", key: "id",
		columns: func(v *controlplane.Volume) []column {
			return []column{
				{"id", &v.ID},
				{"project", &v.Project},
				{"arch", &v.Arch},
				{"agent", &v.Agent},
				{"pool", &v.Pool},
				{"isolated", &v.Isolated},
				{"writers", &v.Writers},
				{"state", &v.State},
				{"created", instant{&v.Created}},
			}
		},
	}
}

func (x *tx) Volume(ctx context.Context, id string) (controlplane.Volume, error) {
	return volumes().byID(ctx, x, id)
}

func (x *tx) Volumes(ctx context.Context, project string) ([]controlplane.Volume, error) {
	return volumes().list(ctx, x, "WHERE project = $1 AND state <> 'tombstone' ORDER BY id", project)
}

func (x *tx) AgentVolumes(ctx context.Context, agent string) ([]controlplane.Volume, error) {
	return volumes().list(ctx, x, "WHERE agent = $1 ORDER BY id", agent)
}

func (x *tx) PutVolume(ctx context.Context, v controlplane.Volume) error {
	return volumes().put(ctx, x, &v)
}

// DeleteVolume deletes a volume and its generations' records.
func (x *tx) DeleteVolume(ctx context.Context, id string) error {
	return volumes().remove(ctx, x, id)
}

func generations() table[controlplane.Generation] {
	return table[controlplane.Generation]{
		name: "generations", noun: "generation", key: "id",
		columns: func(g *controlplane.Generation) []column {
			return []column{
				{"id", &g.ID},
				{"volume", &g.Volume},
				{"machine", &g.Machine},
				{"state", &g.State},
				{"created", instant{&g.Created}},
				{"closed", instant{&g.Closed}},
			}
		},
	}
}

func (x *tx) Generation(ctx context.Context, id string) (controlplane.Generation, error) {
	return generations().byID(ctx, x, id)
}

func (x *tx) Generations(ctx context.Context, volume string) ([]controlplane.Generation, error) {
	return generations().list(ctx, x, "WHERE volume = $1 ORDER BY created DESC, id DESC", volume)
}

func (x *tx) PutGeneration(ctx context.Context, g controlplane.Generation) error {
	err := generations().put(ctx, x, &g)
	if x.violation(err) == violatesReference {
		return x.refuse(err, controlplane.NotFound, "volume %q does not exist", g.Volume)
	}
	return err
}
