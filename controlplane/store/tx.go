package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/opendepot/depot/controlplane"
)

// tx implements [controlplane.Tx] over one transaction; the nouns' methods are
// in files of their own. It is used by one goroutine.
type tx struct {
	sql     *sql.Tx
	dialect dialect
	// writes says that it is an Update's.
	writes bool
	// failed is the first error of a statement. No other runs after it, as it
	// may have ended the transaction, and Update returns it.
	failed error
	// announced is delivered if and when the transaction commits.
	announced []note
}

var _ controlplane.Tx = (*tx)(nil)

// note is an announced change.
type note struct {
	topic controlplane.Topic
	key   string
}

// Announce remembers a change for the commit; in a View it does nothing, as
// nothing changed.
func (x *tx) Announce(topic controlplane.Topic, key string) {
	x.announced = append(x.announced, note{topic, key})
}

// statement returns the context to run a statement with. In an Update a
// statement is never interrupted once it has begun: SQLite answers that by
// rolling the whole transaction back, which others may share.
func (x *tx) statement(ctx context.Context) (context.Context, error) {
	if x.failed != nil {
		return nil, x.failed
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if x.writes {
		return context.WithoutCancel(ctx), nil
	}
	return ctx, nil
}

// fail remembers a statement's error.
func (x *tx) fail(err error) error {
	if x.failed == nil {
		x.failed = err
	}
	return err
}

// exec runs a statement that writes, and returns how many rows it changed.
func (x *tx) exec(ctx context.Context, query string, args ...any) (int64, error) {
	if !x.writes {
		return 0, x.fail(errors.New("a View cannot write: use Update"))
	}
	ctx, err := x.statement(ctx)
	if err != nil {
		return 0, err
	}
	result, err := x.sql.ExecContext(ctx, query, args...)
	if err != nil {
		return 0, x.fail(err)
	}
	return result.RowsAffected()
}

// row reads one row into dest; [sql.ErrNoRows] if there is none.
func (x *tx) row(ctx context.Context, query string, args, dest []any) error {
	ctx, err := x.statement(ctx)
	if err != nil {
		return err
	}
	err = x.sql.QueryRowContext(ctx, query, args...).Scan(dest...)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return x.fail(err)
	}
	return err
}

// rows calls each for every row.
func (x *tx) rows(ctx context.Context, query string, args []any, each func(scan func(...any) error) error) error {
	ctx, err := x.statement(ctx)
	if err != nil {
		return err
	}
	rows, err := x.sql.QueryContext(ctx, query, args...)
	if err != nil {
		return x.fail(err)
	}
	defer rows.Close() //nolint:errcheck // Err tells what ended the rows
	for rows.Next() {
		if err := each(rows.Scan); err != nil {
			return x.fail(err)
		}
	}
	if err := rows.Err(); err != nil {
		return x.fail(err)
	}
	return nil
}

// violation says which rule of the schema the statement broke that err comes
// from: none, if err tells of an earlier statement's refusal.
func (x *tx) violation(err error) violation {
	if controlplane.CodeOf(err) != controlplane.Internal {
		return violatesNothing
	}
	return x.dialect.violation(err)
}

// refuse gives a statement's error a code and words for people; the
// transaction ends with that.
func (x *tx) refuse(cause error, code controlplane.Code, format string, args ...any) error {
	x.failed = &controlplane.Error{Code: code, Message: fmt.Sprintf(format, args...), Err: cause}
	return x.failed
}
