// Package storetest is the conformance suite of [controlplane.Store]: every
// database behind it passes the same tests.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opendepot/depot/controlplane"
)

// Run runs the suite. open returns a new empty store and closes it when its
// test ends.
func Run(t *testing.T, open func(t *testing.T) controlplane.Store) {
	t.Helper()
	tests := map[string]func(t *testing.T, s controlplane.Store){
		"records/round trip of every field": roundTrip,
		"records/unknown ids":               unknown,
		"records/taken names":               taken,
		"records/references":                references,
		"records/deletion":                  deletion,
		"records/lists":                     lists,
		"records/pools are replaced":        poolsReplaced,
		"leases/order":                      leaseOrder,
		"leases/of a scope":                 scopeLeases,
		"leases/of a machine":               machineLeases,
		"leases/queue":                      queue,
		"machines/one-writer":               oneWriter,
		"machines/active":                   activeMachines,
		"machines/pages":                    machinePages,
		"machines/live scopes":              liveScopes,
		"transactions/rollback":             rollback,
		"transactions/panic":                panics,
		"transactions/views do not write":   viewsDoNotWrite,
		"transactions/views see one state":  viewsSeeOneState,
		"transactions/no lost updates":      noLostUpdates,
		"transactions/no write skew":        noWriteSkew,
		"transactions/cancellation":         cancellation,
		"transactions/failed statement":     failedStatement,
		"watchers/after the commit only":    watchAfterCommit,
		"watchers/topics and keys":          watchTopics,
		"watchers/none lost":                watchNoneLost,
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, open(t))
		})
	}
}

// start is the time that the suite's records count from. It has nanoseconds,
// which no store may drop.
func start() time.Time { return time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.UTC) }

func update(t *testing.T, s controlplane.Store, fn func(ctx context.Context, tx controlplane.Tx) error) {
	t.Helper()
	if err := s.Update(t.Context(), func(tx controlplane.Tx) error { return fn(t.Context(), tx) }); err != nil {
		t.Fatalf("update: %v", err)
	}
}

func view(t *testing.T, s controlplane.Store, fn func(ctx context.Context, tx controlplane.Tx) error) {
	t.Helper()
	if err := s.View(t.Context(), func(tx controlplane.Tx) error { return fn(t.Context(), tx) }); err != nil {
		t.Fatalf("view: %v", err)
	}
}

// refused checks that an Update of fn fails with code, in words that hold mention.
func refused(t *testing.T, s controlplane.Store, code controlplane.Code, mention string, fn func(ctx context.Context, tx controlplane.Tx) error) {
	t.Helper()
	err := s.Update(t.Context(), func(tx controlplane.Tx) error { return fn(t.Context(), tx) })
	checkRefusal(t, err, code, mention)
}

func checkRefusal(t *testing.T, err error, code controlplane.Code, mention string) {
	t.Helper()
	if got := controlplane.CodeOf(err); err == nil || got != code || !strings.Contains(err.Error(), mention) {
		t.Errorf("got code %d and error %q, want code %d and a message that names %q", got, err, code, mention)
	}
}

func same[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

// ids returns the ids of a list.
func ids[T any](all []T, id func(T) string) []string {
	var out []string
	for _, v := range all {
		out = append(out, id(v))
	}
	return out
}

func leaseID(l controlplane.Lease) string     { return l.ID }
func machineID(m controlplane.Machine) string { return m.ID }

// put stores records of any kind, in one transaction and in that order.
func put(t *testing.T, s controlplane.Store, records ...any) {
	t.Helper()
	update(t, s, func(ctx context.Context, tx controlplane.Tx) error {
		for _, r := range records {
			if err := putRecord(ctx, tx, r); err != nil {
				return fmt.Errorf("put %T: %w", r, err)
			}
		}
		return nil
	})
}

func putRecord(ctx context.Context, tx controlplane.Tx, record any) error {
	switch r := record.(type) {
	case controlplane.Server:
		return tx.PutServer(ctx, r)
	case controlplane.Organization:
		return tx.PutOrganization(ctx, r)
	case controlplane.Project:
		return tx.PutProject(ctx, r)
	case controlplane.Token:
		return tx.PutToken(ctx, r)
	case controlplane.Lease:
		_, err := tx.PutLease(ctx, r)
		return err
	case controlplane.Machine:
		return tx.PutMachine(ctx, r)
	case controlplane.Volume:
		return tx.PutVolume(ctx, r)
	case controlplane.Generation:
		return tx.PutGeneration(ctx, r)
	case controlplane.Agent:
		return tx.PutAgent(ctx, r)
	case controlplane.Pool:
		return tx.PutPools(ctx, r.Agent, []controlplane.Pool{r})
	}
	return errors.New("no record")
}

// filled returns a T whose every field is set, to values that differ with seed:
// a field that a store forgets shows.
func filled[T any](t *testing.T, seed int) T {
	t.Helper()
	var v T
	n := seed * 1000
	fill(t, reflect.ValueOf(&v).Elem(), &n)
	return v
}

func fill(t *testing.T, v reflect.Value, n *int) {
	t.Helper()
	*n++
	switch f := v.Addr().Interface().(type) {
	case *time.Time:
		*f = start().Add(time.Duration(*n) * time.Hour)
		return
	case *[]byte:
		*f = fmt.Appendf([]byte{0, 0xff}, "%d", *n)
		return
	case *[]string:
		*f = []string{fmt.Sprintf("first %d", *n), `"ö, '☃`}
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for _, field := range v.Fields() {
			fill(t, field, n)
		}
	case reflect.String:
		v.SetString(fmt.Sprintf("text ☃ %d", *n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(1<<40 + int64(*n))
	case reflect.Uint32:
		v.SetUint(1<<31 + uint64(*n)) //nolint:gosec // small and positive
	case reflect.Uint64:
		v.SetUint(1<<63 + uint64(*n)) //nolint:gosec // small and positive
	default:
		t.Fatalf("fill does not know %s: teach it", v.Type())
	}
}
