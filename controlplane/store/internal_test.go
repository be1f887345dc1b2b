package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opendepot/depot/controlplane"
	"modernc.org/sqlite"
)

func openForTest(t *testing.T) *Store {
	t.Helper()
	s, err := Open(context.WithoutCancel(t.Context()), Config{
		Path:   filepath.Join(t.TempDir(), "depot.db"),
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

// explainer opens connections that note the plan of each statement, then run it.
type explainer struct {
	dsn   string
	mu    sync.Mutex // guards plans
	plans []string   // "SEARCH …" or "SCAN …", with the query
}

func (e *explainer) Driver() driver.Driver { return &sqlite.Driver{} }

func (e *explainer) Connect(context.Context) (driver.Conn, error) {
	c, err := e.Driver().Open(e.dsn)
	if err != nil {
		return nil, err
	}
	return &explainedConn{Conn: c, all: e}, nil
}

type explainedConn struct {
	driver.Conn
	all *explainer
}

func (c *explainedConn) inner() interface {
	driver.QueryerContext
	driver.ExecerContext
	driver.ConnBeginTx
} {
	return c.Conn.(interface { //nolint:errcheck,forcetypeassert // a test's panic says it
		driver.QueryerContext
		driver.ExecerContext
		driver.ConnBeginTx
	})
}

func (c *explainedConn) BeginTx(ctx context.Context, o driver.TxOptions) (driver.Tx, error) {
	return c.inner().BeginTx(ctx, o)
}

func (c *explainedConn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	if err := c.explain(ctx, query, args); err != nil {
		return nil, err
	}
	return c.inner().QueryContext(ctx, query, args)
}

func (c *explainedConn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	if err := c.explain(ctx, query, args); err != nil {
		return nil, err
	}
	return c.inner().ExecContext(ctx, query, args)
}

func (c *explainedConn) explain(ctx context.Context, query string, args []driver.NamedValue) (err error) {
	rows, err := c.inner().QueryContext(ctx, "EXPLAIN QUERY PLAN "+query, args)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	row := make([]driver.Value, len(rows.Columns()))
	for rows.Next(row) == nil {
		c.all.mu.Lock()
		c.all.plans = append(c.all.plans, fmt.Sprint(row[len(row)-1], " in ", query))
		c.all.mu.Unlock()
	}
	return nil
}

// perLease are the calls whose cost must not grow with what is stored.
func perLease(ctx context.Context) map[string]func(x *tx) error {
	scope := controlplane.Scope{Project: "prj_1", Arch: "amd64"}
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	return map[string]func(x *tx) error{
		"Server":          func(x *tx) error { _, err := x.Server(ctx); return err },
		"Organization":    func(x *tx) error { _, err := x.Organization(ctx, "org_1"); return err },
		"by name":         func(x *tx) error { _, err := x.OrganizationByName(ctx, "acme"); return err },
		"Project":         func(x *tx) error { _, err := x.Project(ctx, "prj_1"); return err },
		"ProjectByName":   func(x *tx) error { _, err := x.ProjectByName(ctx, "org_1", "web"); return err },
		"Projects":        func(x *tx) error { _, err := x.Projects(ctx, "org_1"); return err },
		"Token":           func(x *tx) error { _, err := x.Token(ctx, "tok_1"); return err },
		"Tokens":          func(x *tx) error { _, err := x.Tokens(ctx, "prj_1"); return err },
		"PutToken":        func(x *tx) error { return x.PutToken(ctx, controlplane.Token{ID: "tok_1"}) },
		"Lease":           func(x *tx) error { _, err := x.Lease(ctx, "lse_1"); return err },
		"PutLease":        func(x *tx) error { _, err := x.PutLease(ctx, controlplane.Lease{ID: "lse_1"}); return err },
		"LiveLeases":      func(x *tx) error { _, err := x.LiveLeases(ctx, scope); return err },
		"MachineLeases":   func(x *tx) error { _, err := x.MachineLeases(ctx, "mch_1", now); return err },
		"PrincipalLeases": func(x *tx) error { _, err := x.PrincipalLeases(ctx, "tok_1"); return err },
		"QueuedScopes":    func(x *tx) error { _, err := x.QueuedScopes(ctx, "amd64", 10); return err },
		"Machine":         func(x *tx) error { _, err := x.Machine(ctx, "mch_1"); return err },
		"PutMachine":      func(x *tx) error { return x.PutMachine(ctx, controlplane.Machine{ID: "mch_1", Volume: "vol_1"}) },
		"ScopeMachines":   func(x *tx) error { _, err := x.ScopeMachines(ctx, scope); return err },
		"AgentMachines":   func(x *tx) error { _, err := x.AgentMachines(ctx, "agt_1"); return err },
		"ScopeLeases":     func(x *tx) error { _, err := x.ScopeLeases(ctx, scope); return err },
		"PoolMachines":    func(x *tx) error { _, err := x.PoolMachines(ctx, "agt_1", "local"); return err },
		"Machines": func(x *tx) error {
			_, err := x.Machines(ctx, controlplane.MachineFilter{Project: "prj_1", Ended: true, Limit: 10})
			return err
		},
		"Volume":        func(x *tx) error { _, err := x.Volume(ctx, "vol_1"); return err },
		"Volumes":       func(x *tx) error { _, err := x.Volumes(ctx, "prj_1"); return err },
		"AgentVolumes":  func(x *tx) error { _, err := x.AgentVolumes(ctx, "agt_1"); return err },
		"PutVolume":     func(x *tx) error { return x.PutVolume(ctx, controlplane.Volume{ID: "vol_1"}) },
		"DeleteVolume":  func(x *tx) error { return x.DeleteVolume(ctx, "vol_1") },
		"Generation":    func(x *tx) error { _, err := x.Generation(ctx, "gen_1"); return err },
		"Generations":   func(x *tx) error { _, err := x.Generations(ctx, "vol_1"); return err },
		"PutGeneration": func(x *tx) error { return x.PutGeneration(ctx, controlplane.Generation{ID: "gen_1", Volume: "vol_1"}) },
		"Agent":         func(x *tx) error { _, err := x.Agent(ctx, "agt_1"); return err },
		"PutAgent":      func(x *tx) error { return x.PutAgent(ctx, controlplane.Agent{ID: "agt_1"}) },
		"Pools":         func(x *tx) error { _, err := x.Pools(ctx, "amd64"); return err },
		"PutPools":      func(x *tx) error { return x.PutPools(ctx, "agt_1", []controlplane.Pool{{Name: "local"}}) },
	}
}

func TestNoQueryPerLeaseScansATable(t *testing.T) {
	t.Parallel()
	s := openForTest(t)
	plans := &explainer{dsn: "file:" + filepath.Join(filepath.Dir(s.lock.Name()), "depot.db")}
	db := sql.OpenDB(plans)
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	for name, call := range perLease(t.Context()) {
		t.Run(name, func(t *testing.T) {
			transaction, err := db.BeginTx(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer transaction.Rollback() //nolint:errcheck // the test wants the plans only
			before := len(plans.plans)
			x := &tx{sql: transaction, dialect: s.dialect, writes: true}
			if err := call(x); err != nil && controlplane.CodeOf(err) != controlplane.NotFound {
				t.Fatal(err)
			}
			searched := strings.HasPrefix(name, "Put")
			for _, p := range plans.plans[before:] {
				searched = searched || strings.HasPrefix(p, "SEARCH ")
				if strings.HasPrefix(p, "SCAN ") && !strings.HasPrefix(p, "SCAN CONSTANT ROW") {
					t.Error(p)
				}
			}
			if !searched {
				t.Errorf("no plan was seen: %q", plans.plans[before:])
			}
		})
	}
}

// TestFullDisk fills the database while others write: SQLite then rolls the
// whole transaction back, and each Update must hear the truth about itself.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	s := openForTest(t)
	setPages := func(n int) {
		t.Helper()
		if _, err := s.writer.db.ExecContext(t.Context(), fmt.Sprintf("PRAGMA max_page_count = %d", n)); err != nil {
			t.Fatal(err)
		}
	}
	setPages(150)
	var mu sync.Mutex
	stored, refused := map[string]bool{}, 0
	var wg sync.WaitGroup
	for i := range 60 {
		wg.Go(func() {
			id := fmt.Sprintf("org_%d", i)
			err := s.Update(t.Context(), func(tx controlplane.Tx) error {
				for _, part := range []string{"a", "b"} {
					// A caller that ignores errors must not do harm either.
					_ = tx.PutOrganization(t.Context(), controlplane.Organization{ID: id + part, Name: id + part + strings.Repeat("x", 4000)})
				}
				return nil
			})
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				stored[id+"a"], stored[id+"b"] = true, true
			case controlplane.CodeOf(err) == controlplane.Unavailable:
				refused++
			default:
				t.Errorf("got error %v, want one that says that the disk is full", err)
			}
		})
	}
	wg.Wait()
	if refused == 0 || len(stored) == 0 {
		t.Errorf("%d updates were refused and %d done: the test wants both", refused, len(stored)/2)
	}
	setPages(1 << 30)
	err := s.Update(t.Context(), func(tx controlplane.Tx) error {
		all, err := tx.Organizations(t.Context())
		for _, o := range all {
			if !stored[o.ID] {
				t.Errorf("%s is stored, though its update was refused", o.ID)
			}
			delete(stored, o.ID)
		}
		if len(stored) > 0 {
			t.Errorf("%d records are lost that were reported stored", len(stored))
		}
		return err
	})
	if err != nil {
		t.Errorf("after room was made: %v", err)
	}
}

// TestBatchesShareCommits checks that Updates which wait for one another are
// committed together, and that none returns before its commit.
func TestBatchesShareCommits(t *testing.T) {
	t.Parallel()
	s := openForTest(t)
	commits := 0
	inner := s.writer.committed
	s.writer.committed = func(n []note) { commits++; inner(n) } // called with the writer's lock held
	const updates = 20
	var wg sync.WaitGroup
	running, proceed := make(chan struct{}), make(chan struct{})
	wg.Go(func() {
		if err := s.Update(t.Context(), func(controlplane.Tx) error {
			close(running)
			<-proceed
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
	<-running
	for i := range updates {
		wg.Go(func() {
			id := fmt.Sprintf("lse_%d", i)
			if err := s.Update(t.Context(), func(tx controlplane.Tx) error {
				_, err := tx.PutLease(t.Context(), controlplane.Lease{ID: id})
				return err
			}); err != nil {
				t.Error(err)
			}
			if err := s.View(t.Context(), func(tx controlplane.Tx) error {
				_, err := tx.Lease(t.Context(), id)
				return err
			}); err != nil {
				t.Errorf("after its update: %v", err)
			}
		})
	}
	for s.writer.waiting.Load() < updates {
		if t.Context().Err() != nil {
			t.Fatal("the updates do not come")
		}
	}
	close(proceed)
	wg.Wait()
	if commits != 1 {
		t.Errorf("%d updates took %d commits, want 1", updates+1, commits)
	}
}
