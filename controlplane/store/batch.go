package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// maxBatch bounds the Updates of one commit, and with it how long the first of
// them waits for the last.
const maxBatch = 64

// errBatch ends the Updates that shared a transaction which one of them lost.
var errBatch = errors.New("the transaction was rolled back by the database")

// batcher runs Updates one after the other on the one connection that writes.
//
// Making a commit durable takes the disk as long as many Updates take, so
// those that come while one runs join its transaction, each in a savepoint of
// its own, and the last of them commits for all. No Update returns before that
// commit. As they run in turn and each sees what the one before it wrote, the
// result is as if each had had a transaction of its own; if the commit fails,
// none of them happened, and each is told so.
type batcher struct {
	db      *sql.DB
	dialect dialect
	// committed is called, in the order of the commits, with what was announced.
	committed func([]note)

	// waiting counts the Updates that have not begun.
	waiting atomic.Int64
	mu      sync.Mutex // guards open and closed, and is held while an Update runs
	open    *batch
	closed  bool
}

// batch is one transaction and the Updates in it.
type batch struct {
	sql       *sql.Tx
	size      int
	announced []note
	// done is closed after the commit, and err is set before.
	done chan struct{}
	err  error
}

// update runs fn in a savepoint and returns after its commit.
func (w *batcher) update(ctx context.Context, fn func(*tx) error) error {
	b, err := w.join(ctx, fn)
	if b == nil {
		return err
	}
	<-b.done
	if b.err != nil {
		return b.err
	}
	return err
}

// join runs fn in the open batch, and commits that if nobody else comes. It
// returns fn's error, and no batch if fn did not run.
func (w *batcher) join(ctx context.Context, fn func(*tx) error) (b *batch, err error) {
	w.waiting.Add(1)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waiting.Add(-1)
	defer func() {
		// Also after a panic of fn, which is its caller's business alone. Whoever
		// waits comes by here too, so the last one commits.
		if b := w.open; b != nil && (w.waiting.Load() == 0 || b.size >= maxBatch || b.err != nil) {
			w.commit()
		}
	}()
	switch {
	case w.closed:
		return nil, errors.New("the store is closed")
	case ctx.Err() != nil:
		return nil, ctx.Err()
	}
	if w.open == nil {
		// The transaction may outlive the Update that began it.
		t, err := w.db.BeginTx(context.WithoutCancel(ctx), nil)
		if err != nil {
			return nil, fmt.Errorf("begin: %w", err)
		}
		w.open = &batch{sql: t, done: make(chan struct{})}
	}
	b = w.open
	b.size++
	return b, w.run(ctx, b, fn)
}

// run runs fn in a savepoint of b, and takes back what it wrote if it fails.
func (w *batcher) run(ctx context.Context, b *batch, fn func(*tx) error) (err error) {
	ctx = context.WithoutCancel(ctx)
	if _, err := b.sql.ExecContext(ctx, "SAVEPOINT one"); err != nil {
		b.err = errors.Join(errBatch, err)
		return err
	}
	x := &tx{sql: b.sql, dialect: w.dialect, writes: true}
	kept := false
	defer func() {
		end := "RELEASE one"
		if !kept {
			end = "ROLLBACK TO one; RELEASE one"
		}
		// A full disk or a failing one takes the whole transaction with it,
		// and the savepoint too.
		if _, lost := b.sql.ExecContext(ctx, end); lost != nil {
			b.err = errors.Join(errBatch, err, lost)
		}
	}()
	if err := fn(x); err != nil {
		return err
	}
	if x.failed != nil {
		return x.failed
	}
	kept = true
	b.announced = append(b.announced, x.announced...)
	return nil
}

// commit ends the open batch.
func (w *batcher) commit() {
	b := w.open
	w.open = nil
	if b.err != nil {
		b.err = errors.Join(b.err, b.sql.Rollback())
	} else if err := b.sql.Commit(); err != nil {
		b.err = fmt.Errorf("commit: %w", err)
	}
	if b.err == nil {
		w.committed(b.announced)
	}
	close(b.done)
}

// close waits for the Updates that have begun and refuses all others.
func (w *batcher) close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	if w.open != nil {
		w.commit()
	}
	return w.db.Close()
}
