package storetest

import (
	"context"
	"testing"
	"time"

	"github.com/opendepot/depot/controlplane"
)

// trip stores a first version of a record, a second one, and one with nothing
// but its references; each must come back as it was.
func trip[T any](
	t *testing.T, s controlplane.Store,
	name func(v *T), get func(ctx context.Context, tx controlplane.Tx, v T) (T, error),
) {
	t.Helper()
	var empty T
	for what, v := range map[string]T{"filled": filled[T](t, 1), "replaced": filled[T](t, 2), "empty": empty} {
		name(&v)
		put(t, s, v)
		view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
			got, err := get(ctx, tx, v)
			same(t, what, got, v)
			return err
		})
	}
}

func roundTrip(t *testing.T, s controlplane.Store) {
	t.Helper()
	trip(t, s, func(v *controlplane.Server) { v.ID = "srv_1" },
		func(ctx context.Context, tx controlplane.Tx, _ controlplane.Server) (controlplane.Server, error) {
			return tx.Server(ctx)
		})
	trip(t, s, func(v *controlplane.Organization) { v.ID = "org_1" },
		func(ctx context.Context, tx controlplane.Tx, v controlplane.Organization) (controlplane.Organization, error) {
			return tx.Organization(ctx, v.ID)
		})
	trip(t, s, func(v *controlplane.Project) { v.ID, v.Org = "prj_1", "org_1" },
		func(ctx context.Context, tx controlplane.Tx, v controlplane.Project) (controlplane.Project, error) {
			return tx.Project(ctx, v.ID)
		})
	trip(t, s, func(v *controlplane.Token) { v.ID, v.Project = "tok_1", "prj_1" },
		func(ctx context.Context, tx controlplane.Tx, v controlplane.Token) (controlplane.Token, error) {
			return tx.Token(ctx, v.ID)
		})
	trip(t, s, func(v *controlplane.Lease) { v.ID, v.Seq = "lse_1", 1 },
		func(ctx context.Context, tx controlplane.Tx, v controlplane.Lease) (controlplane.Lease, error) {
			return tx.Lease(ctx, v.ID)
		})
	trip(t, s, func(v *controlplane.Machine) { v.ID = "mch_1" },
		func(ctx context.Context, tx controlplane.Tx, v controlplane.Machine) (controlplane.Machine, error) {
			return tx.Machine(ctx, v.ID)
		})
	trip(t, s, func(v *controlplane.Volume) { v.ID = "vol_1" },
		func(ctx context.Context, tx controlplane.Tx, v controlplane.Volume) (controlplane.Volume, error) {
			return tx.Volume(ctx, v.ID)
		})
	trip(t, s, func(v *controlplane.Generation) { v.ID, v.Volume = "gen_1", "vol_1" },
		func(ctx context.Context, tx controlplane.Tx, v controlplane.Generation) (controlplane.Generation, error) {
			return tx.Generation(ctx, v.ID)
		})
	trip(t, s, func(v *controlplane.Agent) { v.ID = "agt_1" },
		func(ctx context.Context, tx controlplane.Tx, v controlplane.Agent) (controlplane.Agent, error) {
			return tx.Agent(ctx, v.ID)
		})
	trip(t, s, func(v *controlplane.Pool) { v.Agent = "agt_1" },
		func(ctx context.Context, tx controlplane.Tx, _ controlplane.Pool) (controlplane.Pool, error) {
			all, err := tx.Pools(ctx, "")
			if err != nil || len(all) != 1 {
				t.Fatalf("got %d pools and error %v, want one", len(all), err)
			}
			return all[0], nil
		})
}

func unknown(t *testing.T, s controlplane.Store) {
	t.Helper()
	put(t, s, controlplane.Organization{ID: "org_1", Name: "acme"})
	calls := map[string]func(ctx context.Context, tx controlplane.Tx) error{
		"organization": func(ctx context.Context, tx controlplane.Tx) error {
			_, err := tx.Organization(ctx, "absent")
			return err
		},
		"organization by name": func(ctx context.Context, tx controlplane.Tx) error {
			_, err := tx.OrganizationByName(ctx, "absent")
			return err
		},
		"project": func(ctx context.Context, tx controlplane.Tx) error { _, err := tx.Project(ctx, "absent"); return err },
		"project by name": func(ctx context.Context, tx controlplane.Tx) error {
			_, err := tx.ProjectByName(ctx, "org_1", "absent")
			return err
		},
		"token":   func(ctx context.Context, tx controlplane.Tx) error { _, err := tx.Token(ctx, "absent"); return err },
		"lease":   func(ctx context.Context, tx controlplane.Tx) error { _, err := tx.Lease(ctx, "absent"); return err },
		"machine": func(ctx context.Context, tx controlplane.Tx) error { _, err := tx.Machine(ctx, "absent"); return err },
		"volume":  func(ctx context.Context, tx controlplane.Tx) error { _, err := tx.Volume(ctx, "absent"); return err },
		"generation": func(ctx context.Context, tx controlplane.Tx) error {
			_, err := tx.Generation(ctx, "absent")
			return err
		},
		"agent":          func(ctx context.Context, tx controlplane.Tx) error { _, err := tx.Agent(ctx, "absent"); return err },
		"delete project": func(ctx context.Context, tx controlplane.Tx) error { return tx.DeleteProject(ctx, "absent") },
		"delete token":   func(ctx context.Context, tx controlplane.Tx) error { return tx.DeleteToken(ctx, "absent") },
		"delete volume":  func(ctx context.Context, tx controlplane.Tx) error { return tx.DeleteVolume(ctx, "absent") },
		"delete agent":   func(ctx context.Context, tx controlplane.Tx) error { return tx.DeleteAgent(ctx, "absent") },
	}
	for name, call := range calls {
		t.Run(name, func(t *testing.T) { refused(t, s, controlplane.NotFound, `"absent"`, call) })
	}
	t.Run("server", func(t *testing.T) {
		refused(t, s, controlplane.NotFound, "server", func(ctx context.Context, tx controlplane.Tx) error {
			_, err := tx.Server(ctx)
			return err
		})
	})
	t.Run("and the transaction goes on", func(t *testing.T) {
		update(t, s, func(ctx context.Context, tx controlplane.Tx) error {
			if _, err := tx.Lease(ctx, "absent"); err == nil {
				t.Error("found a lease that is not there")
			}
			return tx.PutOrganization(ctx, controlplane.Organization{ID: "org_2", Name: "other"})
		})
	})
}

func taken(t *testing.T, s controlplane.Store) {
	t.Helper()
	put(t, s,
		controlplane.Organization{ID: "org_1", Name: "acme"}, controlplane.Organization{ID: "org_2", Name: "other"},
		controlplane.Project{ID: "prj_1", Org: "org_1", Name: "web"}, controlplane.Project{ID: "prj_2", Org: "org_1", Name: "api"},
		controlplane.Project{ID: "prj_3", Org: "org_2", Name: "web"}, // the name is free in another organization
	)
	for name, record := range map[string]any{
		"new organization":     controlplane.Organization{ID: "org_3", Name: "acme"},
		"renamed organization": controlplane.Organization{ID: "org_2", Name: "acme"},
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, s, controlplane.Exists, `"acme"`, func(ctx context.Context, tx controlplane.Tx) error { return putRecord(ctx, tx, record) })
		})
	}
	for name, record := range map[string]any{
		"new project":     controlplane.Project{ID: "prj_4", Org: "org_1", Name: "web"},
		"renamed project": controlplane.Project{ID: "prj_2", Org: "org_1", Name: "web"},
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, s, controlplane.Exists, `"web"`, func(ctx context.Context, tx controlplane.Tx) error { return putRecord(ctx, tx, record) })
		})
	}
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		p, err := tx.ProjectByName(ctx, "org_2", "web")
		same(t, "project by name", p.ID, "prj_3")
		return err
	})
}

func references(t *testing.T, s controlplane.Store) {
	t.Helper()
	for name, record := range map[string]any{
		"project of no organization": controlplane.Project{ID: "prj_1", Org: "absent", Name: "web"},
		"token of no project":        controlplane.Token{ID: "tok_1", Project: "absent"},
		"generation of no volume":    controlplane.Generation{ID: "gen_1", Volume: "absent"},
		"pool of no agent":           controlplane.Pool{Agent: "absent", Name: "local"},
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, s, controlplane.NotFound, `"absent"`, func(ctx context.Context, tx controlplane.Tx) error { return putRecord(ctx, tx, record) })
		})
	}
}

func deletion(t *testing.T, s controlplane.Store) {
	t.Helper()
	put(t, s,
		controlplane.Organization{ID: "org_1", Name: "acme"},
		controlplane.Project{ID: "prj_1", Org: "org_1", Name: "web"},
		controlplane.Token{ID: "tok_1", Project: "prj_1"}, controlplane.Token{ID: "tok_2"}, controlplane.Token{ID: "tok_3"},
		controlplane.Volume{ID: "vol_1"}, controlplane.Generation{ID: "gen_1", Volume: "vol_1"},
		controlplane.Agent{ID: "agt_1"}, controlplane.Pool{Agent: "agt_1", Name: "local"},
		// History outlives what it is about.
		controlplane.Machine{ID: "mch_1", Project: "prj_1", Agent: "agt_1", Volume: "vol_1"},
		controlplane.Lease{ID: "lse_1", Project: "prj_1", Machine: "mch_1"},
	)
	update(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		for _, err := range []error{
			tx.DeleteProject(ctx, "prj_1"), tx.DeleteToken(ctx, "tok_2"),
			tx.DeleteVolume(ctx, "vol_1"), tx.DeleteAgent(ctx, "agt_1"),
		} {
			if err != nil {
				return err
			}
		}
		return nil
	})
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		tokens, err := tx.Tokens(ctx, "")
		if err != nil {
			return err
		}
		same(t, "tokens", ids(tokens, func(v controlplane.Token) string { return v.ID }), []string{"tok_3"})
		generations, err := tx.Generations(ctx, "vol_1")
		if err != nil {
			return err
		}
		pools, err := tx.Pools(ctx, "")
		same(t, "what is left", []int{len(generations), len(pools)}, []int{0, 0})
		if err != nil {
			return err
		}
		if _, err := tx.Machine(ctx, "mch_1"); err != nil {
			return err
		}
		_, err = tx.Lease(ctx, "lse_1")
		return err
	})
}

func lists(t *testing.T, s controlplane.Store) {
	t.Helper()
	at := func(h int) time.Time { return start().Add(time.Duration(h) * time.Hour) }
	put(t, s,
		controlplane.Organization{ID: "org_1", Name: "zeta"}, controlplane.Organization{ID: "org_2", Name: "acme"},
		controlplane.Project{ID: "prj_1", Org: "org_1", Name: "web"}, controlplane.Project{ID: "prj_2", Org: "org_1", Name: "api"},
		controlplane.Project{ID: "prj_3", Org: "org_2", Name: "cli"},
		controlplane.Token{ID: "tok_1", Project: "prj_1", Created: at(3)}, controlplane.Token{ID: "tok_2", Project: "prj_1", Created: at(1)},
		controlplane.Token{ID: "tok_3", Org: "org_1", Created: at(2)},
		controlplane.Volume{ID: "vol_1", Project: "prj_1", Agent: "agt_1", State: controlplane.VolumeTombstone},
		controlplane.Volume{ID: "vol_2", Project: "prj_1", Agent: "agt_2", State: controlplane.VolumeLost},
		controlplane.Volume{ID: "vol_3", Project: "prj_1", Agent: "agt_1", State: controlplane.VolumeActive},
		controlplane.Volume{ID: "vol_4", Project: "prj_2", Agent: "agt_1", State: controlplane.VolumeActive},
		controlplane.Generation{ID: "gen_1", Volume: "vol_3", Created: at(1)}, controlplane.Generation{ID: "gen_2", Volume: "vol_3", Created: at(3)},
		controlplane.Generation{ID: "gen_3", Volume: "vol_3", Created: at(2)}, controlplane.Generation{ID: "gen_4", Volume: "vol_4", Created: at(2)},
		controlplane.Agent{ID: "agt_1", Name: "zulu"}, controlplane.Agent{ID: "agt_2", Name: "alpha"},
	)
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		organizations, err := tx.Organizations(ctx)
		check(t, "organizations by name", organizations, err, func(v controlplane.Organization) string { return v.ID }, "org_2", "org_1")
		project := func(v controlplane.Project) string { return v.ID }
		projects, err := tx.Projects(ctx, "org_1")
		check(t, "projects by name", projects, err, project, "prj_2", "prj_1")
		projects, err = tx.Projects(ctx, "")
		check(t, "all projects by name", projects, err, project, "prj_2", "prj_3", "prj_1")
		token := func(v controlplane.Token) string { return v.ID }
		tokens, err := tx.Tokens(ctx, "prj_1")
		check(t, "tokens, oldest first", tokens, err, token, "tok_2", "tok_1")
		tokens, err = tx.Tokens(ctx, "")
		check(t, "all tokens, oldest first", tokens, err, token, "tok_2", "tok_3", "tok_1")
		volume := func(v controlplane.Volume) string { return v.ID }
		volumes, err := tx.Volumes(ctx, "prj_1")
		check(t, "volumes without tombstones", volumes, err, volume, "vol_2", "vol_3")
		volumes, err = tx.AgentVolumes(ctx, "agt_1")
		check(t, "volumes of an agent", volumes, err, volume, "vol_1", "vol_3", "vol_4")
		generations, err := tx.Generations(ctx, "vol_3")
		check(t, "generations, newest first", generations, err, func(v controlplane.Generation) string { return v.ID }, "gen_2", "gen_3", "gen_1")
		agents, err := tx.Agents(ctx)
		check(t, "agents by name", agents, err, func(v controlplane.Agent) string { return v.ID }, "agt_2", "agt_1")
		return nil
	})
}

// check compares the ids of a list with those wanted, in order.
func check[T any](t *testing.T, what string, got []T, err error, id func(T) string, want ...string) {
	t.Helper()
	if err != nil {
		t.Errorf("%s: %v", what, err)
		return
	}
	same(t, what, ids(got, id), want)
}

func poolsReplaced(t *testing.T, s controlplane.Store) {
	t.Helper()
	name := func(p controlplane.Pool) string { return p.Agent + "/" + p.Name }
	set := func(agent string, pools ...controlplane.Pool) {
		update(t, s, func(ctx context.Context, tx controlplane.Tx) error { return tx.PutPools(ctx, agent, pools) })
	}
	put(t, s, controlplane.Agent{ID: "agt_1"}, controlplane.Agent{ID: "agt_2"})
	set("agt_1", controlplane.Pool{Name: "b", Arch: "amd64"}, controlplane.Pool{Name: "a", Arch: "arm64"})
	set("agt_2", controlplane.Pool{Name: "a", Arch: "amd64"})
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		all, err := tx.Pools(ctx, "")
		check(t, "all", all, err, name, "agt_1/a", "agt_1/b", "agt_2/a")
		all, err = tx.Pools(ctx, "amd64")
		check(t, "amd64", all, err, name, "agt_1/b", "agt_2/a")
		return nil
	})
	set("agt_1", controlplane.Pool{Name: "c", Arch: "amd64"})
	set("agt_2")
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		all, err := tx.Pools(ctx, "")
		check(t, "replaced", all, err, name, "agt_1/c")
		return nil
	})
}
