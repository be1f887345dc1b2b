package store

import (
	"database/sql/driver"
	"encoding/json"
	"fmt"
	"reflect"
	"time"
)

// column ties a column to a field, for reading and for writing: a noun's
// columns are listed once, so that the two cannot differ.
type column struct {
	name string
	// field is a pointer that database/sql can scan into, or a codec.
	field any
}

// codec is a field that is stored in another form than its own.
type codec interface {
	driver.Valuer
	Scan(src any) error
}

// value returns what is stored of c's field.
func (c column) value() any {
	if v, ok := c.field.(codec); ok {
		return v
	}
	return reflect.ValueOf(c.field).Elem().Interface()
}

// instant stores a time as nanoseconds since 1970, and the zero time as NULL.
type instant struct{ t *time.Time }

func (i instant) Value() (driver.Value, error) {
	if i.t.IsZero() {
		return nil, nil
	}
	if y := i.t.Year(); y < 1678 || y > 2261 { // what 64 bits can hold
		return nil, fmt.Errorf("time %s cannot be stored", i.t)
	}
	return i.t.UnixNano(), nil
}

func (i instant) Scan(src any) error {
	switch v := src.(type) {
	case nil:
		*i.t = time.Time{}
	case int64:
		*i.t = time.Unix(0, v).UTC()
	default:
		return fmt.Errorf("a %T is not a time", src)
	}
	return nil
}

// optional stores an empty text as NULL.
type optional struct{ s *string }

func (o optional) Value() (driver.Value, error) {
	if *o.s == "" {
		return nil, nil
	}
	return *o.s, nil
}

func (o optional) Scan(src any) error {
	switch v := src.(type) {
	case nil:
		*o.s = ""
	case string:
		*o.s = v
	case []byte:
		*o.s = string(v)
	default:
		return fmt.Errorf("a %T is not a text", src)
	}
	return nil
}

// list stores texts as a JSON array. An empty list is read as nil.
type list struct{ s *[]string }

func (l list) Value() (driver.Value, error) {
	if len(*l.s) == 0 {
		return "[]", nil
	}
	b, err := json.Marshal(*l.s)
	return string(b), err
}

func (l list) Scan(src any) error {
	var text string
	if err := (optional{&text}).Scan(src); err != nil {
		return err
	}
	*l.s = nil
	if text == "[]" {
		return nil
	}
	return json.Unmarshal([]byte(text), l.s)
}

// bits stores an unsigned number in a signed column, bit by bit: SQL has no
// unsigned ones. It does not keep the order, so it serves equality only.
type bits struct{ n *uint64 }

func (b bits) Value() (driver.Value, error) {
	return int64(*b.n), nil //nolint:gosec // the two's complement is what is meant
}

func (b bits) Scan(src any) error {
	v, ok := src.(int64)
	if !ok {
		return fmt.Errorf("a %T is not a number", src)
	}
	*b.n = uint64(v) //nolint:gosec // the two's complement is what is meant
	return nil
}
