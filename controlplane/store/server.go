package store

import (
	"context"

	"github.com/opendepot/depot/controlplane"
)

// serverRow is the one row of the control plane's own record.
type serverRow struct {
	one int64
	controlplane.Server
}

func servers() table[serverRow] {
	return table[serverRow]{
		name: "server", noun: "server record", key: "one",
		columns: func(s *serverRow) []column {
			return []column{
				{"one", &s.one},
				{"id", &s.ID},
				{"epoch", &s.Epoch},
				{"agents_certificate", &s.Agents.Certificate},
				{"agents_sealed_key", &s.Agents.SealedKey},
				{"tls_certificate", &s.TLS.Certificate},
				{"tls_sealed_key", &s.TLS.SealedKey},
				{"join_key", &s.JoinKey},
				{"created", instant{&s.Created}},
			}
		},
	}
}

func (x *tx) Server(ctx context.Context) (controlplane.Server, error) {
	row, err := servers().get(ctx, x, "of this control plane", "WHERE one = 1")
	return row.Server, err
}

func (x *tx) PutServer(ctx context.Context, s controlplane.Server) error {
	return servers().put(ctx, x, &serverRow{one: 1, Server: s})
}

func organizations() table[controlplane.Organization] {
	return table[controlplane.Organization]{
		name: "organizations", noun: "organization", key: "id",
		columns: func(o *controlplane.Organization) []column {
			return []column{{"id", &o.ID}, {"name", &o.Name}, {"created", instant{&o.Created}}}
		},
	}
}

func (x *tx) Organization(ctx context.Context, id string) (controlplane.Organization, error) {
	return organizations().byID(ctx, x, id)
}

func (x *tx) OrganizationByName(ctx context.Context, name string) (controlplane.Organization, error) {
	return organizations().get(ctx, x, name, "WHERE name = $1", name)
}

func (x *tx) Organizations(ctx context.Context) ([]controlplane.Organization, error) {
	return organizations().list(ctx, x, "ORDER BY name")
}

func (x *tx) PutOrganization(ctx context.Context, o controlplane.Organization) error {
	err := organizations().put(ctx, x, &o)
	if x.violation(err) == violatesUnique {
		return x.refuse(err, controlplane.Exists, "organization %q exists already: choose another name", o.Name)
	}
	return err
}

func projects() table[controlplane.Project] {
	return table[controlplane.Project]{
		name: "projects", noun: "project", key: "id",
		columns: func(p *controlplane.Project) []column {
			return []column{
				{"id", &p.ID},
				{"org", &p.Org},
				{"name", &p.Name},
				{"size", &p.Size},
				{"idle_timeout", &p.IdleTimeout},
				{"max_builds_per_machine", &p.MaxBuildsPerMachine},
				{"max_machines", &p.MaxMachines},
				{"cache_keep", &p.CacheKeep},
				{"cache_bytes", &p.CacheBytes},
				{"entitlements", list{&p.Entitlements}},
				{"certificate", &p.Authority.Certificate},
				{"sealed_key", &p.Authority.SealedKey},
				{"request", optional{&p.Request}},
				{"created", instant{&p.Created}},
			}
		},
	}
}

func (x *tx) Project(ctx context.Context, id string) (controlplane.Project, error) {
	return projects().byID(ctx, x, id)
}

func (x *tx) ProjectByName(ctx context.Context, org, name string) (controlplane.Project, error) {
	return projects().get(ctx, x, name, "WHERE org = $1 AND name = $2", org, name)
}

func (x *tx) Projects(ctx context.Context, org string) ([]controlplane.Project, error) {
	if org == "" {
		return projects().list(ctx, x, "ORDER BY name, id")
	}
	return projects().list(ctx, x, "WHERE org = $1 ORDER BY name", org)
}

func (x *tx) PutProject(ctx context.Context, p controlplane.Project) error {
	err := projects().put(ctx, x, &p)
	switch x.violation(err) {
	case violatesUnique:
		return x.refuse(err, controlplane.Exists, "project %q exists already in this organization: choose another name", p.Name)
	case violatesReference:
		return x.refuse(err, controlplane.NotFound, "organization %q does not exist", p.Org)
	case violatesNothing:
	}
	return err
}

// DeleteProject deletes a project and its tokens.
func (x *tx) DeleteProject(ctx context.Context, id string) error {
	return projects().remove(ctx, x, id)
}

func tokens() table[controlplane.Token] {
	return table[controlplane.Token]{
		name: "tokens", noun: "token", key: "id",
		columns: func(t *controlplane.Token) []column {
			return []column{
				{"id", &t.ID},
				{"kind", &t.Kind},
				{"name", &t.Name},
				{"org", optional{&t.Org}},
				{"project", optional{&t.Project}},
				{"role", &t.Role},
				{"hash", &t.Hash},
				{"created", instant{&t.Created}},
				{"expires", instant{&t.Expires}},
				{"used", instant{&t.Used}},
				{"used_key", &t.UsedKey},
			}
		},
	}
}

func (x *tx) Token(ctx context.Context, id string) (controlplane.Token, error) {
	return tokens().byID(ctx, x, id)
}

func (x *tx) Tokens(ctx context.Context, project string) ([]controlplane.Token, error) {
	if project == "" {
		return tokens().list(ctx, x, "ORDER BY created, id")
	}
	return tokens().list(ctx, x, "WHERE project = $1 ORDER BY created, id", project)
}

func (x *tx) PutToken(ctx context.Context, t controlplane.Token) error {
	err := tokens().put(ctx, x, &t)
	if x.violation(err) == violatesReference {
		return x.refuse(err, controlplane.NotFound, "project %q does not exist", t.Project)
	}
	return err
}

func (x *tx) DeleteToken(ctx context.Context, id string) error {
	return tokens().remove(ctx, x, id)
}
