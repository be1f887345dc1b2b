package store

import (
	"io/fs"

	"github.com/pressly/goose/v3"
)

// dialect is all in which the databases differ for the code that asks them.
// They share the rest: $1 for parameters, ON CONFLICT … DO UPDATE, partial
// indexes, RETURNING.
type dialect struct {
	// goose and migrations are the schema's history.
	goose      goose.Dialect
	migrations fs.FS
	// nextLease is the statement that takes and returns the next Seq.
	nextLease string
	// violation says which rule of the schema err broke.
	violation func(err error) violation
	// retryable reports whether the transaction may succeed if it runs again.
	retryable func(err error) bool
	// refusal gives err a code and words for people where they can do
	// something about it, and returns it as it is elsewhere.
	refusal func(err error) error
}

// violation is a rule of the schema that a statement broke.
type violation int

const (
	violatesNothing violation = iota
	// violatesUnique is a unique index other than the primary key.
	violatesUnique
	// violatesReference is a row that refers to one that does not exist, or
	// the deletion of one that is referred to.
	violatesReference
)
