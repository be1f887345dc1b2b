package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/opendepot/depot/controlplane"
)

func leases() table[controlplane.Lease] {
	return table[controlplane.Lease]{
		name: "leases", noun: "lease", key: "id",
		columns: func(l *controlplane.Lease) []column {
			return []column{
				{"id", &l.ID},
				{"project", &l.Project},
				{"arch", &l.Arch},
				{"isolated", &l.Isolated},
				{"principal", &l.Principal},
				{"principal_name", &l.PrincipalName},
				{"key", &l.Key},
				{"seq", &l.Seq},
				{"state", &l.State},
				{"machine", optional{&l.Machine}},
				{"queued", &l.Queued},
				{"reason", &l.Reason},
				{"end_cause", &l.End},
				{"connections", &l.Connections},
				{"connected", &l.Connected},
				{"created", instant{&l.Created}},
				{"polled", instant{&l.Polled}},
				{"ready", instant{&l.Ready}},
				{"renewed", instant{&l.Renewed}},
				{"quiet", instant{&l.Quiet}},
				{"ended", instant{&l.Ended}},
				{"cancel_refs", list{&l.CancelRefs}},
				{"certificate_until", instant{&l.CertificateUntil}},
			}
		},
	}
}

func (x *tx) Lease(ctx context.Context, id string) (controlplane.Lease, error) {
	return leases().byID(ctx, x, id)
}

// PutLease gives a new lease its Seq; that of a known one never changes.
func (x *tx) PutLease(ctx context.Context, l controlplane.Lease) (controlplane.Lease, error) {
	err := x.row(ctx, "SELECT seq FROM leases WHERE id = $1", []any{l.ID}, []any{&l.Seq})
	if errors.Is(err, sql.ErrNoRows) {
		err = x.row(ctx, x.dialect.nextLease, nil, []any{&l.Seq})
	}
	if err != nil {
		return controlplane.Lease{}, fmt.Errorf("number lease %s: %w", l.ID, err)
	}
	if err := leases().put(ctx, x, &l); err != nil {
		return controlplane.Lease{}, err
	}
	// As stored means: as it will be read.
	return leases().byID(ctx, x, l.ID)
}

func (x *tx) LiveLeases(ctx context.Context, s controlplane.Scope) ([]controlplane.Lease, error) {
	return leases().list(ctx, x, "WHERE project = $1 AND arch = $2 AND state <> 'ended' ORDER BY seq", s.Project, s.Arch)
}

// MachineLeases are two queries in one, as each has an index of its own: those
// that ended are many, and few of them still have a certificate.
func (x *tx) MachineLeases(ctx context.Context, machine string, now time.Time) ([]controlplane.Lease, error) {
	query := leases().selects() + " WHERE machine = $1 AND state <> 'ended' UNION ALL " +
		leases().selects() + " WHERE machine = $1 AND state = 'ended' AND certificate_until > $2 ORDER BY seq"
	return leases().query(ctx, x, query, machine, instant{&now})
}

func (x *tx) PrincipalLeases(ctx context.Context, principal string) ([]controlplane.Lease, error) {
	return leases().list(ctx, x, "WHERE principal = $1 AND state <> 'ended' ORDER BY seq", principal)
}

func (x *tx) LiveScopes(ctx context.Context) ([]controlplane.Scope, error) {
	return x.scopes(ctx, "SELECT project, arch FROM leases WHERE state <> 'ended' "+
		"UNION SELECT project, arch FROM machines WHERE gone IS NULL ORDER BY project, arch")
}

func (x *tx) ScopeLeases(ctx context.Context, s controlplane.Scope) (int, error) {
	n := 0
	err := x.row(ctx, "SELECT count(*) FROM leases WHERE project = $1 AND arch = $2 AND state <> 'ended'", []any{s.Project, s.Arch}, []any{&n})
	if err != nil {
		return 0, fmt.Errorf("count the leases of %s: %w", s, err)
	}
	return n, nil
}

func (x *tx) QueuedScopes(ctx context.Context, arch string, limit int) ([]controlplane.Scope, error) {
	return x.scopes(ctx, "SELECT project, arch FROM leases WHERE arch = $1 AND state = 'waiting' AND queued "+
		"GROUP BY arch, project ORDER BY min(seq) LIMIT $2", arch, limit)
}

func (x *tx) scopes(ctx context.Context, query string, args ...any) ([]controlplane.Scope, error) {
	var all []controlplane.Scope
	err := x.rows(ctx, query, args, func(scan func(...any) error) error {
		var s controlplane.Scope
		err := scan(&s.Project, &s.Arch)
		all = append(all, s)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list scopes: %w", err)
	}
	return all, nil
}
