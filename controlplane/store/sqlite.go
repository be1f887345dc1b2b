package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/opendepot/depot/controlplane"
	"github.com/pressly/goose/v3"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

//go:embed migrations
var migrations embed.FS

const (
	// busyTimeout is how long a statement waits for another program's lock,
	// such as a sqlite3 shell's.
	busyTimeout = 5 * time.Second
	// readers bounds the connections for View; each costs about 100 kB.
	readers = 8
)

func sqliteDialect() (dialect, error) {
	files, err := fs.Sub(migrations, "migrations/sqlite")
	if err != nil {
		return dialect{}, fmt.Errorf("open migrations: %w", err)
	}
	return dialect{
		goose:      goose.DialectSQLite3,
		migrations: files,
		nextLease:  "UPDATE numbers SET value = value + 1 WHERE name = 'lease' RETURNING value",
		violation:  sqliteViolation,
		retryable:  sqliteRetryable,
		refusal:    sqliteRefusal,
	}, nil
}

// openSQLite returns the connection that writes, and those that read, of the
// database file at path. The file is readable by its owner only; SQLite gives
// the files beside it the same mode.
func openSQLite(ctx context.Context, path string) (writer, reader *sql.DB, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600) //nolint:gosec // the path is the operator's setting
	if err != nil {
		return nil, nil, fmt.Errorf("open database: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, nil, fmt.Errorf("open database: %w", err)
	}
	common := []string{
		fmt.Sprintf("busy_timeout(%d)", busyTimeout.Milliseconds()),
		"foreign_keys(1)",
		"journal_mode(wal)",
		"synchronous(full)", // a commit is on the disk before it is reported (nothing-lost)
	}
	writer, err = sql.Open("sqlite", sqliteDSN(path, "immediate", common...))
	if err != nil {
		return nil, nil, fmt.Errorf("open database %s: %w", path, err)
	}
	writer.SetMaxOpenConns(1)
	// It also makes the file a WAL database, which readers could not.
	if err := writer.PingContext(ctx); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open database %s: %w", path, err), writer.Close())
	}
	reader, err = sql.Open("sqlite", sqliteDSN(path, "deferred", append(common, "query_only(1)")...))
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open database %s: %w", path, err), writer.Close())
	}
	reader.SetMaxOpenConns(readers)
	reader.SetMaxIdleConns(readers)
	return writer, reader, nil
}

// copySQLite writes the database at path, as of one moment, to the empty file
// at to. It reads on a connection of its own, so that nobody waits for it.
func copySQLite(ctx context.Context, path, to string) error {
	db, err := sql.Open("sqlite", sqliteDSN(path, "deferred"))
	if err != nil {
		return err
	}
	_, err = db.ExecContext(ctx, "VACUUM INTO $1", to)
	return errors.Join(err, db.Close())
}

func sqliteDSN(path, lock string, pragmas ...string) string {
	u := url.URL{Scheme: "file", Path: filepath.ToSlash(path)}
	u.RawQuery = url.Values{"_pragma": pragmas, "_txlock": {lock}}.Encode()
	return u.String()
}

func sqliteCode(err error) int {
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		return e.Code()
	}
	return sqlite3.SQLITE_OK
}

func sqliteViolation(err error) violation {
	switch sqliteCode(err) {
	case sqlite3.SQLITE_CONSTRAINT_UNIQUE:
		return violatesUnique
	case sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
		return violatesReference
	}
	return violatesNothing
}

// sqliteRetryable knows the codes of a lock that another program holds. The low
// byte is the code, the rest says more of it (https://sqlite.org/rescode.html).
func sqliteRetryable(err error) bool {
	primary := sqliteCode(err) & 0xff
	return primary == sqlite3.SQLITE_BUSY || primary == sqlite3.SQLITE_LOCKED
}

func sqliteRefusal(err error) error {
	message := ""
	switch code := sqliteCode(err) & 0xff; {
	case sqliteRetryable(err):
		message = "the control plane's database is locked by another program: end that program, or try again"
	case code == sqlite3.SQLITE_FULL:
		message = "the control plane cannot store anything, as its disk is full: free some space there, then try again"
	default:
		return err
	}
	return &controlplane.Error{Code: controlplane.Unavailable, Message: message, Err: err}
}
