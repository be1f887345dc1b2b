package storetest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/opendepot/depot/controlplane"
)

// acme is a record to write where any will do.
func acme() controlplane.Organization {
	return controlplane.Organization{ID: "org_1", Name: "acme", Created: start()}
}

func absent(t *testing.T, s controlplane.Store, id string) {
	t.Helper()
	err := s.View(t.Context(), func(tx controlplane.Tx) error {
		_, err := tx.Organization(t.Context(), id)
		return err
	})
	checkRefusal(t, err, controlplane.NotFound, id)
}

func rollback(t *testing.T, s controlplane.Store) {
	t.Helper()
	fault := errors.New("the caller's own")
	err := s.Update(t.Context(), func(tx controlplane.Tx) error {
		if err := tx.PutOrganization(t.Context(), acme()); err != nil {
			return err
		}
		if _, err := tx.Organization(t.Context(), "org_1"); err != nil {
			t.Errorf("a transaction does not see what it wrote: %v", err)
		}
		return fault
	})
	if err != fault { //nolint:errorlint // it must come back unchanged, not wrapped
		t.Errorf("got error %v, want the function's own", err)
	}
	absent(t, s, "org_1")
	err = s.View(t.Context(), func(controlplane.Tx) error { return fault })
	if err != fault { //nolint:errorlint // it must come back unchanged, not wrapped
		t.Errorf("got error %v, want the function's own", err)
	}
}

func panics(t *testing.T, s controlplane.Store) {
	t.Helper()
	watcher := s.Watch(controlplane.TopicLease, "")
	defer watcher.Close()
	var wg sync.WaitGroup
	for i := range 20 { // half of them panic beside the others
		wg.Go(func() {
			defer func() {
				if got := recover(); (got == "on purpose") != (i%2 == 0) {
					t.Errorf("recovered %v from update %d", got, i)
				}
			}()
			id := fmt.Sprintf("org_%d", i)
			err := s.Update(t.Context(), func(tx controlplane.Tx) error {
				err := tx.PutOrganization(t.Context(), controlplane.Organization{ID: id, Name: id})
				if i%2 == 0 {
					panic("on purpose")
				}
				return err
			})
			if err != nil {
				t.Errorf("update %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		all, err := tx.Organizations(ctx)
		same(t, "organizations", len(all), 10)
		return err
	})
	same(t, "announced", watcher.Take(), []string{})
}

func viewsDoNotWrite(t *testing.T, s controlplane.Store) {
	t.Helper()
	put(t, s, acme(), controlplane.Agent{ID: "agt_1"}, controlplane.Volume{ID: "vol_1"},
		controlplane.Project{ID: "prj_1", Org: "org_1", Name: "web"}, controlplane.Token{ID: "tok_1"})
	writes := map[string]func(ctx context.Context, tx controlplane.Tx) error{
		"delete project": func(ctx context.Context, tx controlplane.Tx) error { return tx.DeleteProject(ctx, "prj_1") },
		"delete token":   func(ctx context.Context, tx controlplane.Tx) error { return tx.DeleteToken(ctx, "tok_1") },
		"delete volume":  func(ctx context.Context, tx controlplane.Tx) error { return tx.DeleteVolume(ctx, "vol_1") },
		"delete agent":   func(ctx context.Context, tx controlplane.Tx) error { return tx.DeleteAgent(ctx, "agt_1") },
		"no pools":       func(ctx context.Context, tx controlplane.Tx) error { return tx.PutPools(ctx, "agt_1", nil) },
	}
	for _, record := range []any{
		controlplane.Server{ID: "srv_1"},
		controlplane.Organization{ID: "org_2", Name: "other"},
		controlplane.Project{ID: "prj_2", Org: "org_1", Name: "api"},
		controlplane.Token{ID: "tok_2"},
		controlplane.Lease{ID: "lse_1"},
		controlplane.Machine{ID: "mch_1"},
		controlplane.Volume{ID: "vol_2"},
		controlplane.Generation{ID: "gen_1", Volume: "vol_1"},
		controlplane.Agent{ID: "agt_2"},
		controlplane.Pool{Agent: "agt_1", Name: "local"},
	} {
		writes[fmt.Sprintf("put %T", record)] = func(ctx context.Context, tx controlplane.Tx) error { return putRecord(ctx, tx, record) }
	}
	for name, write := range writes {
		t.Run(name, func(t *testing.T) {
			err := s.View(t.Context(), func(tx controlplane.Tx) error { return write(t.Context(), tx) })
			if err == nil {
				t.Error("a View wrote")
			}
		})
	}
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		organizations, err := tx.Organizations(ctx)
		same(t, "organizations", len(organizations), 1)
		if err != nil {
			return err
		}
		_, err = tx.Token(ctx, "tok_1")
		return err
	})
}

func viewsSeeOneState(t *testing.T, s controlplane.Store) {
	t.Helper()
	put(t, s, acme())
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		before, err := tx.Organizations(ctx)
		if err != nil {
			return err
		}
		done := make(chan error)
		go func() {
			done <- s.Update(ctx, func(tx controlplane.Tx) error {
				return tx.PutOrganization(ctx, controlplane.Organization{ID: "org_2", Name: "other"})
			})
		}()
		if err := <-done; err != nil {
			return err
		}
		after, err := tx.Organizations(ctx)
		same(t, "organizations within one View", after, before)
		return err
	})
	// The next one sees what was committed before it began.
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		_, err := tx.Organization(ctx, "org_2")
		return err
	})
}

func noLostUpdates(t *testing.T, s controlplane.Store) {
	t.Helper()
	put(t, s, acme(), controlplane.Project{ID: "prj_1", Org: "org_1", Name: "web"})
	const writers, each = 8, 25
	fault := errors.New("on purpose")
	increment := func(tx controlplane.Tx) error {
		p, err := tx.Project(t.Context(), "prj_1")
		if err != nil {
			return err
		}
		p.MaxMachines++
		return tx.PutProject(t.Context(), p)
	}
	takenBack := func(tx controlplane.Tx) error { return errors.Join(increment(tx), fault) }
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for i := range each {
				fn := increment
				if i%5 == 0 {
					fn = takenBack
				}
				if err := s.Update(t.Context(), fn); err != nil && !errors.Is(err, fault) {
					t.Errorf("update: %v", err)
				}
			}
		})
	}
	wg.Wait()
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		p, err := tx.Project(ctx, "prj_1")
		same(t, "count", p.MaxMachines, writers*each*4/5)
		return err
	})
}

// noWriteSkew has each of many transactions take the one free place of a scope
// after it saw the place free.
func noWriteSkew(t *testing.T, s controlplane.Store) {
	t.Helper()
	scope := controlplane.Scope{Project: "prj_1", Arch: "amd64"}
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			err := s.Update(t.Context(), func(tx controlplane.Tx) error {
				all, err := tx.ScopeMachines(t.Context(), scope)
				if err != nil || len(all) > 0 {
					return err
				}
				return tx.PutMachine(t.Context(), controlplane.Machine{ID: fmt.Sprintf("mch_%d", i), Project: scope.Project, Arch: scope.Arch})
			})
			if err != nil {
				t.Errorf("update: %v", err)
			}
		})
	}
	wg.Wait()
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		all, err := tx.ScopeMachines(ctx, scope)
		same(t, "machines", len(all), 1)
		return err
	})
}

func cancellation(t *testing.T, s controlplane.Store) {
	t.Helper()
	over, cancel := context.WithCancel(t.Context())
	cancel()
	never := func(controlplane.Tx) error {
		t.Error("the function ran")
		return nil
	}
	for name, err := range map[string]error{"update": s.Update(over, never), "view": s.View(over, never)} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: got error %v, want that of its context", name, err)
		}
	}
	// Cancelled between two statements, beside others that are not.
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			id := fmt.Sprintf("org_%d", i)
			err := s.Update(ctx, func(tx controlplane.Tx) error {
				if err := tx.PutOrganization(ctx, controlplane.Organization{ID: id, Name: id}); err != nil {
					return err
				}
				if i%2 == 0 {
					cancel()
				}
				_, err := tx.Organization(ctx, id)
				return err
			})
			if want := i%2 == 0; want != errors.Is(err, context.Canceled) || !want && err != nil {
				t.Errorf("update %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	view(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		all, err := tx.Organizations(ctx)
		same(t, "organizations", len(all), 10)
		return err
	})
}

// failedStatement checks that a transaction cannot go on, let alone commit,
// after a statement of it has failed: databases differ in what it would hold.
func failedStatement(t *testing.T, s controlplane.Store) {
	t.Helper()
	put(t, s, acme())
	refused(t, s, controlplane.Exists, `"acme"`, func(ctx context.Context, tx controlplane.Tx) error {
		if err := tx.PutOrganization(ctx, controlplane.Organization{ID: "org_2", Name: "other"}); err != nil {
			return err
		}
		if err := tx.PutOrganization(ctx, controlplane.Organization{ID: "org_3", Name: "acme"}); err == nil {
			t.Error("two organizations have one name")
		}
		if err := tx.PutOrganization(ctx, controlplane.Organization{ID: "org_4", Name: "more"}); err == nil {
			t.Error("a failed transaction went on")
		}
		return nil
	})
	for _, id := range []string{"org_2", "org_3", "org_4"} {
		absent(t, s, id)
	}
}
