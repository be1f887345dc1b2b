package controlplane

import (
	"encoding/binary"
	"encoding/hex"
	"io"
	"strings"
	"time"
)

// Kind is the prefix of an id; it says what the id names.
type Kind string

// The kinds of id.
const (
	KindServer       Kind = "srv"
	KindOrganization Kind = "org"
	KindProject      Kind = "prj"
	KindToken        Kind = "tok"
	KindLease        Kind = "lse"
	KindMachine      Kind = "mch"
	KindVolume       Kind = "vol"
	KindGeneration   Kind = "gen"
	KindAgent        Kind = "agt"
	KindPool         Kind = "pol"
)

// NewID returns kind, an underscore and a UUIDv7 in 32 hexadecimal digits
// (RFC 9562, section 5.7): ids of one kind sort by the millisecond they were
// made in. It reads ten bytes from random, whose failure is not survivable.
func NewID(kind Kind, now time.Time, random io.Reader) string {
	var b [16]byte
	if _, err := io.ReadFull(random, b[6:]); err != nil {
		panic("random source: " + err.Error())
	}
	var ms [8]byte
	binary.BigEndian.PutUint64(ms[:], uint64(now.UnixMilli()))
	copy(b[:6], ms[2:])
	b[6] = b[6]&0x0f | 0x70
	b[8] = b[8]&0x3f | 0x80
	return string(kind) + "_" + hex.EncodeToString(b[:])
}

// ValidID reports whether id has the form that [NewID] gives for kind. Ids
// that arrive from outside are checked with it before they reach a path, a
// certificate or the store.
func ValidID(kind Kind, id string) bool {
	digits, ok := strings.CutPrefix(id, string(kind)+"_")
	if !ok || len(digits) != 32 {
		return false
	}
	for _, c := range digits {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
