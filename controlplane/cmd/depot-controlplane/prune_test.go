package main

import (
	"context"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/opendepot/depot/controlplane"
	"github.com/opendepot/depot/controlplane/store"
)

func TestPrune(t *testing.T) {
	t.Parallel()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	st, err := store.Open(t.Context(), store.Config{Path: filepath.Join(t.TempDir(), "depot.db"), Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	ended := map[string]time.Time{"lse_old": now.Add(-31 * 24 * time.Hour), "lse_new": now.Add(-29 * 24 * time.Hour)}
	err = st.Update(t.Context(), func(tx controlplane.Tx) error {
		for id, at := range ended {
			if _, err := tx.PutLease(t.Context(), controlplane.Lease{ID: id, State: controlplane.LeaseEnded, Ended: at}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	has := func(id string) bool {
		err := st.View(t.Context(), func(tx controlplane.Tx) error {
			_, err := tx.Lease(t.Context(), id)
			return err
		})
		if err != nil && controlplane.CodeOf(err) != controlplane.NotFound {
			t.Fatal(err)
		}
		return err == nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- prune(ctx, log, st, controlplane.DefaultTimes().KeepEnded, func() time.Time { return now })
	}()
	for has("lse_old") {
		<-time.After(time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil || !has("lse_new") {
		t.Errorf("pruning ended with %v; the newer lease is there: %t", err, has("lse_new"))
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
}
