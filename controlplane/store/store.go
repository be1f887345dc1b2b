// Package store keeps the control plane's truth in an SQL database, with plain
// database/sql: it implements [controlplane.Store].
//
// The embedded default is SQLite in a file: WAL, one connection that writes,
// several that read, and every commit on the disk before it is reported. Its
// directory is locked against a second control plane. What another database
// does differently is in one value, the dialect; storetest.Run is the suite
// that any of them must pass.
//
// The schema itself guards one-writer: a unique index lets one machine at most
// hold a volume.
//
// An Update must not be called from within a View's or another Update's
// function. A statement that fails ends its transaction, whatever the function
// returns.
package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/opendepot/depot/controlplane"
	"github.com/pressly/goose/v3"
)

const (
	// attempts bounds how often a transaction runs that another's lock stops.
	attempts = 4
	// retryWait is the pause before the second attempt; it doubles.
	retryWait = 20 * time.Millisecond
)

// Config says where the store is.
type Config struct {
	// Path is the SQLite database file. Its directory, the data directory, is
	// made if it is missing, and locked while the store is open.
	Path   string
	Logger *slog.Logger
}

// Store implements [controlplane.Store]. It is safe for concurrent use.
type Store struct {
	path    string
	dialect dialect
	writer  *batcher
	reader  *sql.DB
	watches watches
	lock    *os.File
}

var _ controlplane.Store = (*Store)(nil)

// Open opens the store, making it or bringing its schema up to date where
// needed. It fails if another control plane has it open, naming that one's
// process, and if a newer program wrote it. Close it after use.
func Open(ctx context.Context, c Config) (_ *Store, err error) {
	path, err := filepath.Abs(c.Path)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	lock, err := lockDirectory(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
		}
	}()
	d, err := sqliteDialect()
	if err != nil {
		return nil, err
	}
	writer, reader, err := openSQLite(ctx, path)
	if err != nil {
		return nil, err
	}
	if err := migrate(ctx, d, writer, c.Logger); err != nil {
		return nil, errors.Join(fmt.Errorf("database %s: %w", path, err), reader.Close(), writer.Close())
	}
	s := &Store{path: path, dialect: d, reader: reader, lock: lock}
	s.writer = &batcher{db: writer, dialect: d, committed: s.watches.deliver}
	return s, nil
}

// migrate brings the schema up to what this program knows.
func migrate(ctx context.Context, d dialect, db *sql.DB, log *slog.Logger) error {
	p, err := goose.NewProvider(d.goose, db, d.migrations, goose.WithDisableGlobalRegistry(true), goose.WithSlog(log))
	if err != nil {
		return fmt.Errorf("read migrations: %w", err)
	}
	have, know, err := p.GetVersions(ctx)
	if err != nil {
		return fmt.Errorf("read schema version: %w", err)
	}
	if have > know {
		return fmt.Errorf("it was written by a newer depot (schema %d, this program knows %d): run that version, or restore a backup of this one", have, know)
	}
	if _, err := p.Up(ctx); err != nil {
		return fmt.Errorf("migrate schema from %d to %d: %w", have, know, err)
	}
	return nil
}

// View runs fn on one state of the store; what fn writes fails.
func (s *Store) View(ctx context.Context, fn func(tx controlplane.Tx) error) error {
	return s.try(ctx, func() (err error) {
		t, err := s.reader.BeginTx(ctx, &sql.TxOptions{ReadOnly: true})
		if err != nil {
			return fmt.Errorf("begin: %w", err)
		}
		// There is nothing to commit; after a cancellation it is done already.
		defer t.Rollback() //nolint:errcheck // nothing was written
		return fn(&tx{sql: t, dialect: s.dialect})
	})
}

// Update runs fn in one serializable transaction, and returns after its commit
// is durable.
func (s *Store) Update(ctx context.Context, fn func(tx controlplane.Tx) error) error {
	return s.try(ctx, func() error {
		return s.writer.update(ctx, func(x *tx) error { return fn(x) })
	})
}

// try runs do again while another's lock or lost transaction stops it.
func (s *Store) try(ctx context.Context, do func() error) error {
	wait := retryWait
	for attempt := 1; ; attempt++ {
		err := do()
		if err == nil {
			return nil
		}
		if attempt == attempts || !errors.Is(err, errBatch) && !s.dialect.retryable(err) {
			return s.dialect.refusal(err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		wait *= 2
	}
}

// Watch returns a watcher; see [controlplane.Store].
func (s *Store) Watch(topic controlplane.Topic, key string) controlplane.Watcher { //nolint:ireturn // the seam's signature
	return s.watches.add(topic, key)
}

// Backup writes a copy of the store, as of one moment, to a new file at path,
// while the store is in use. The file must not exist.
func (s *Store) Backup(ctx context.Context, path string) error {
	// SQLite would take an empty file; made here, it is its owner's only.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600) //nolint:gosec // the path is the operator's choice
	if err != nil {
		return fmt.Errorf("back up: %w", err)
	}
	err = copySQLite(ctx, s.path, path)
	// SQLite does not sync the copy.
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(fmt.Errorf("back up to %s: %w", path, err), os.Remove(path))
	}
	return nil
}

// pruneBatch bounds the rows that one transaction of Prune deletes, and with
// it how long others wait for it.
const pruneBatch = 1000

// Prune deletes what ended before that time and says nothing about the present:
// leases whose certificates have expired, machines that are gone, and
// generations of which nothing is left. It returns how many records it deleted.
func (s *Store) Prune(ctx context.Context, before time.Time) (deleted int64, err error) {
	for _, query := range []string{
		"DELETE FROM leases WHERE id IN (SELECT id FROM leases WHERE state = 'ended' AND ended < $1 " +
			"AND (certificate_until IS NULL OR certificate_until < $1) LIMIT $2)",
		"DELETE FROM machines WHERE id IN (SELECT id FROM machines WHERE gone IS NOT NULL AND ended < $1 " +
			"AND gone < $1 AND state IN ('stopped', 'failed') LIMIT $2)",
		"DELETE FROM generations WHERE id IN (SELECT id FROM generations WHERE closed < $1 " +
			"AND state IN ('discarded', 'expired', 'lost') LIMIT $2)",
	} {
		for n := int64(pruneBatch); n == pruneBatch; deleted += n {
			err := s.try(ctx, func() error {
				return s.writer.update(ctx, func(x *tx) (err error) {
					n, err = x.exec(ctx, query, instant{&before}, pruneBatch)
					return err
				})
			})
			if err != nil {
				return deleted, fmt.Errorf("prune: %w", err)
			}
		}
	}
	return deleted, nil
}

// Close waits for what runs, and unlocks the data directory. Watchers stay
// silent from then on.
func (s *Store) Close() error {
	// The connection that writes is the last to close: it folds the log in.
	return errors.Join(s.reader.Close(), s.writer.close(), s.lock.Close())
}
