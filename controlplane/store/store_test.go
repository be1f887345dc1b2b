package store_test

import (
	"context"
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/opendepot/depot/controlplane"
	"github.com/opendepot/depot/controlplane/store"
	"github.com/opendepot/depot/controlplane/store/storetest"
)

func logger(t *testing.T) *slog.Logger {
	t.Helper()
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}

// open opens a store, which the test's end closes.
func open(t *testing.T, path string) *store.Store {
	t.Helper()
	s, err := store.Open(context.WithoutCancel(t.Context()), store.Config{Path: path, Logger: logger(t)})
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

func TestSQLite(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(t *testing.T) controlplane.Store {
		t.Helper()
		return open(t, filepath.Join(t.TempDir(), "depot.db"))
	})
}
