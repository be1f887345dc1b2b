package controlplane

import (
	"errors"
	"fmt"
)

// Code classifies an [Error]; the server maps it to the wire in one place.
type Code int

// The codes a domain error can carry. Anything without one is internal: it is
// logged whole and the caller sees an id to quote.
const (
	// Internal is the zero Code: a fault of ours.
	Internal Code = iota
	// Invalid marks input that can never succeed as it stands.
	Invalid
	// Unauthenticated marks a missing, unknown, expired or revoked credential.
	Unauthenticated
	// Denied marks a known principal without the right.
	Denied
	// NotFound marks a name or id that does not exist, or that the caller may
	// not know to exist.
	NotFound
	// Exists marks a name or id that is already taken by something else.
	Exists
	// Precondition marks a request that the present state refuses.
	Precondition
	// Exhausted marks a quota or rate that is used up.
	Exhausted
	// Unavailable marks a passing condition: the same call may succeed later.
	Unavailable
)

// Error is a refusal that a person can act on: Message says what happened, to
// what, and what to do next.
type Error struct {
	Code    Code
	Message string
	// Err is the cause, kept for logs and errors.Is; it is never shown.
	Err error
}

// Error returns the message that is shown to the caller.
func (e *Error) Error() string { return e.Message }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Errorf returns an [Error] with code and a formatted message.
func Errorf(code Code, format string, args ...any) error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// CodeOf returns the code of the first [Error] in err's chain, or Internal.
func CodeOf(err error) Code {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	return Internal
}
