package store_test

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opendepot/depot/controlplane"
	"github.com/opendepot/depot/controlplane/store"
)

func putLease(t *testing.T, s *store.Store, l controlplane.Lease) {
	t.Helper()
	err := s.Update(t.Context(), func(tx controlplane.Tx) error {
		_, err := tx.PutLease(t.Context(), l)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func lease(t *testing.T, s *store.Store, id string) (l controlplane.Lease, err error) {
	t.Helper()
	err = s.View(t.Context(), func(tx controlplane.Tx) error {
		l, err = tx.Lease(t.Context(), id)
		return err
	})
	return l, err
}

func TestOpenLocksTheDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	first, err := store.Open(t.Context(), store.Config{Path: filepath.Join(dir, "depot.db"), Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	// Another file in it would be another truth for the same volumes.
	_, err = store.Open(t.Context(), store.Config{Path: filepath.Join(dir, "other.db"), Logger: logger(t)})
	if err == nil || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("got error %v, want one that names the directory and the process", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, filepath.Join(dir, "depot.db"))
}

func TestOpenKeepsWhatWasStored(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "new", "depot.db")
	s, err := store.Open(t.Context(), store.Config{Path: path, Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	putLease(t, s, controlplane.Lease{ID: "lse_1", Reason: "kept"})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Update(t.Context(), func(controlplane.Tx) error { return nil }); err == nil {
		t.Error("a closed store took an update")
	}
	s = open(t, path)
	if l, err := lease(t, s, "lse_1"); err != nil || l.Reason != "kept" {
		t.Errorf("got %+v and error %v", l, err)
	}
	putLease(t, s, controlplane.Lease{ID: "lse_2"})
	if l, err := lease(t, s, "lse_2"); err != nil || l.Seq != 2 {
		t.Errorf("got seq %d and error %v, want 2: the order goes on after a restart", l.Seq, err)
	}
}

func TestFilesAreTheOwnersOnly(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "data")
	s := open(t, filepath.Join(dir, "depot.db"))
	putLease(t, s, controlplane.Lease{ID: "lse_1"})
	if err := s.Backup(t.Context(), filepath.Join(dir, "backup.db")); err != nil {
		t.Fatal(err)
	}
	var names []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if mode := info.Mode().Perm(); mode&0o077 != 0 {
			t.Errorf("%s has mode %04o", path, mode)
		}
		names = append(names, d.Name())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"data", "backup.db", "controlplane.lock", "depot.db", "depot.db-shm", "depot.db-wal"}
	if d := cmp.Diff(want, names); d != "" {
		t.Errorf("files (-want +got):\n%s", d)
	}
}

func TestBackup(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "depot.db"))
	putLease(t, s, controlplane.Lease{ID: "lse_1"})
	path := filepath.Join(t.TempDir(), "backup's ☃.db")
	if err := s.Backup(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	putLease(t, s, controlplane.Lease{ID: "lse_2"})
	if err := s.Backup(t.Context(), path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("got error %v, want that the file exists", err)
	}
	restored := open(t, path)
	if _, err := lease(t, restored, "lse_1"); err != nil {
		t.Errorf("lease from before the backup: %v", err)
	}
	if _, err := lease(t, restored, "lse_2"); controlplane.CodeOf(err) != controlplane.NotFound {
		t.Errorf("lease from after the backup: got error %v", err)
	}
}

func TestOpenRefusesANewerSchema(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "depot.db")
	s, err := store.Open(t.Context(), store.Config{Path: path, Logger: logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	raw(t, path, "INSERT INTO goose_db_version (version_id, is_applied) VALUES (999, 1)")
	_, err = store.Open(t.Context(), store.Config{Path: path, Logger: logger(t)})
	if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "newer depot (schema 999") {
		t.Errorf("got error %v, want one that names the file and the schema", err)
	}
}

func TestOpenRefusesWhatIsNoDatabase(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "depot.db")
	text := []byte(strings.Repeat("not a database\n", 1000))
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Open(t.Context(), store.Config{Path: path, Logger: logger(t)}); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("got error %v, want one that names the file", err)
	}
	got, err := os.ReadFile(path) //nolint:gosec // the test's own file
	if err != nil || !cmp.Equal(got, text) {
		t.Errorf("the file was changed (error %v)", err)
	}
}

// raw runs a statement on the file at path, as another program would.
func raw(t *testing.T, path, query string) {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = db.ExecContext(t.Context(), query)
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestPrune(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "depot.db"))
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	old := now.Add(-time.Hour)
	ended := controlplane.LeaseEnded
	for _, l := range []controlplane.Lease{
		{ID: "lse_live", State: controlplane.LeaseReady, Created: old},
		{ID: "lse_new", State: ended, Ended: now},
		{ID: "lse_certified", State: ended, Ended: old, CertificateUntil: now.Add(time.Minute)},
		{ID: "lse_old", State: ended, Ended: old},
		{ID: "lse_older", State: ended, Ended: old, CertificateUntil: old},
	} {
		putLease(t, s, l)
	}
	err := s.Update(t.Context(), func(tx controlplane.Tx) error {
		var errs []error
		for _, m := range []controlplane.Machine{
			{ID: "mch_held", State: controlplane.MachineFailed, Ended: old, Volume: "vol_1"},
			{ID: "mch_new", State: controlplane.MachineStopped, Ended: old, Gone: now},
			{ID: "mch_old", State: controlplane.MachineStopped, Ended: old, Gone: old},
		} {
			errs = append(errs, tx.PutMachine(t.Context(), m))
		}
		errs = append(errs, tx.PutVolume(t.Context(), controlplane.Volume{ID: "vol_1", State: controlplane.VolumeActive}))
		for _, g := range []controlplane.Generation{
			{ID: "gen_open", State: controlplane.GenerationOpen},
			{ID: "gen_kept", State: controlplane.GenerationCommitted, Closed: old},
			{ID: "gen_dirty", State: controlplane.GenerationDirty, Closed: old},
			{ID: "gen_new", State: controlplane.GenerationExpired, Closed: now},
			{ID: "gen_old", State: controlplane.GenerationExpired, Closed: old},
		} {
			g.Volume = "vol_1"
			errs = append(errs, tx.PutGeneration(t.Context(), g))
		}
		return errors.Join(errs...)
	})
	if err != nil {
		t.Fatal(err)
	}
	if n, err := s.Prune(t.Context(), now); n != 4 || err != nil {
		t.Errorf("pruned %d records and got error %v, want 4", n, err)
	}
	for id, want := range map[string]controlplane.Code{
		"lse_live": controlplane.Internal, "lse_new": controlplane.Internal, "lse_certified": controlplane.Internal,
		"lse_old": controlplane.NotFound, "lse_older": controlplane.NotFound,
	} {
		if _, err := lease(t, s, id); controlplane.CodeOf(err) != want {
			t.Errorf("%s: got error %v", id, err)
		}
	}
	err = s.View(t.Context(), func(tx controlplane.Tx) error {
		if generations, err := tx.Generations(t.Context(), "vol_1"); len(generations) != 4 || err != nil {
			t.Errorf("%d generations are left, and error %v; want 4", len(generations), err)
		}
		all, err := tx.Machines(t.Context(), controlplane.MachineFilter{Ended: true})
		if len(all) != 2 {
			t.Errorf("kept %d machines, want 2", len(all))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestReadersDoNotWait checks that Views go on while an Update runs.
func TestReadersDoNotWait(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "depot.db"))
	err := s.Update(t.Context(), func(tx controlplane.Tx) error {
		if _, err := tx.PutLease(t.Context(), controlplane.Lease{ID: "lse_1"}); err != nil {
			return err
		}
		done := make(chan error)
		go func() {
			_, err := lease(t, s, "lse_1")
			done <- err
		}()
		if err := <-done; controlplane.CodeOf(err) != controlplane.NotFound {
			t.Errorf("got error %v, want that nothing is committed", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// BenchmarkUpdate shows what sharing commits is worth: the time per Update
// falls with the number of clients.
func BenchmarkUpdate(b *testing.B) {
	for _, clients := range []int{1, 16, 200} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) {
			ctx := context.WithoutCancel(b.Context())
			s, err := store.Open(ctx, store.Config{Path: filepath.Join(b.TempDir(), "depot.db"), Logger: slog.New(slog.DiscardHandler)})
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close() //nolint:errcheck // the benchmark is over
			next := make(chan int)
			var wg sync.WaitGroup
			for range clients {
				wg.Go(func() {
					for i := range next {
						err := s.Update(ctx, func(tx controlplane.Tx) error {
							_, err := tx.PutLease(ctx, controlplane.Lease{ID: fmt.Sprint("lse_", i), Project: "prj_1", Arch: "amd64", State: controlplane.LeaseWaiting})
							return err
						})
						if err != nil {
							b.Error(err)
						}
					}
				})
			}
			b.ResetTimer()
			for i := range b.N {
				next <- i
			}
			close(next)
			wg.Wait()
		})
	}
}
