package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/opendepot/depot/controlplane"
)

// table maps a noun to its table.
type table[T any] struct {
	name string
	// noun is the noun for messages.
	noun string
	// key is the primary key: "id", or several columns with commas.
	key     string
	columns func(*T) []column
}

// get returns the one row that rest selects, or NotFound naming name.
func (t table[T]) get(ctx context.Context, x *tx, name, rest string, args ...any) (T, error) {
	var v T
	err := x.row(ctx, t.selects()+" "+rest, args, fields(t.columns(&v)))
	if errors.Is(err, sql.ErrNoRows) {
		return v, controlplane.Errorf(controlplane.NotFound, "%s %q does not exist", t.noun, name)
	}
	if err != nil {
		return v, fmt.Errorf("read %s %s: %w", t.noun, name, err)
	}
	return v, nil
}

// byID returns the row with that id, or NotFound.
func (t table[T]) byID(ctx context.Context, x *tx, id string) (T, error) {
	return t.get(ctx, x, id, "WHERE id = $1", id)
}

// list returns the rows that rest selects.
func (t table[T]) list(ctx context.Context, x *tx, rest string, args ...any) ([]T, error) {
	return t.query(ctx, x, t.selects()+" "+rest, args...)
}

// query returns the rows of a whole query that selects t's columns.
func (t table[T]) query(ctx context.Context, x *tx, query string, args ...any) ([]T, error) {
	var all []T
	err := x.rows(ctx, query, args, func(scan func(...any) error) error {
		var v T
		err := scan(fields(t.columns(&v))...)
		all = append(all, v)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", t.name, err)
	}
	return all, nil
}

// put writes v whole, new or not.
func (t table[T]) put(ctx context.Context, x *tx, v *T) error {
	columns := t.columns(v)
	var names, places, sets []string
	var args []any
	for i, c := range columns {
		names = append(names, c.name)
		places = append(places, "$"+strconv.Itoa(i+1))
		sets = append(sets, c.name+" = excluded."+c.name)
		args = append(args, c.value())
	}
	query := "INSERT INTO " + t.name + " (" + strings.Join(names, ", ") + ") VALUES (" + strings.Join(places, ", ") +
		") ON CONFLICT (" + t.key + ") DO UPDATE SET " + strings.Join(sets, ", ")
	if _, err := x.exec(ctx, query, args...); err != nil {
		return fmt.Errorf("store %s: %w", t.noun, err)
	}
	return nil
}

// remove deletes the row with that id, or returns NotFound.
func (t table[T]) remove(ctx context.Context, x *tx, id string) error {
	n, err := x.exec(ctx, "DELETE FROM "+t.name+" WHERE id = $1", id)
	if err != nil {
		return fmt.Errorf("delete %s %s: %w", t.noun, id, err)
	}
	if n == 0 {
		return controlplane.Errorf(controlplane.NotFound, "%s %q does not exist", t.noun, id)
	}
	return nil
}

// selects is the start of a query for whole rows of t.
func (t table[T]) selects() string {
	var v T
	columns := t.columns(&v)
	names := make([]string, len(columns))
	for i, c := range columns {
		names[i] = c.name
	}
	return "SELECT " + strings.Join(names, ", ") + " FROM " + t.name
}

func fields(columns []column) []any {
	all := make([]any, len(columns))
	for i, c := range columns {
		all[i] = c.field
	}
	return all
}
