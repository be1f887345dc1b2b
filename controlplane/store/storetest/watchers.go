package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/opendepot/depot/controlplane"
)

// ready reports whether the watcher has something to take, now.
func ready(w controlplane.Watcher) bool {
	select {
	case <-w.C():
		return true
	default:
		return false
	}
}

func announce(t *testing.T, s controlplane.Store, topic controlplane.Topic, keys ...string) {
	t.Helper()
	update(t, s, func(_ context.Context, tx controlplane.Tx) error {
		for _, k := range keys {
			tx.Announce(topic, k)
		}
		return nil
	})
}

func watchAfterCommit(t *testing.T, s controlplane.Store) {
	t.Helper()
	w := s.Watch(controlplane.TopicLease, "lse_1")
	defer w.Close()
	update(t, s, func(_ context.Context, tx controlplane.Tx) error {
		tx.Announce(controlplane.TopicLease, "lse_1")
		if ready(w) {
			t.Error("announced before the commit")
		}
		return nil
	})
	if !ready(w) {
		t.Error("not announced after the commit")
	}
	same(t, "announced", w.Take(), []string{"lse_1"})
	same(t, "taken already", w.Take(), []string{})

	fault := errors.New("on purpose")
	err := s.Update(t.Context(), func(tx controlplane.Tx) error {
		tx.Announce(controlplane.TopicLease, "lse_1")
		return fault
	})
	if !errors.Is(err, fault) || ready(w) || len(w.Take()) > 0 {
		t.Errorf("a rolled back change was announced (error %v)", err)
	}
}

func watchTopics(t *testing.T, s controlplane.Store) {
	t.Helper()
	one, two := s.Watch(controlplane.TopicLease, "lse_1"), s.Watch(controlplane.TopicLease, "lse_1")
	all, other := s.Watch(controlplane.TopicLease, ""), s.Watch(controlplane.TopicMachine, "")
	closed := s.Watch(controlplane.TopicLease, "")
	closed.Close()
	closed.Close() // twice is once
	for _, w := range []controlplane.Watcher{one, two, all, other} {
		defer w.Close()
	}
	announce(t, s, controlplane.TopicLease, "lse_2")
	announce(t, s, controlplane.TopicLease, "lse_1", "lse_1")
	announce(t, s, controlplane.TopicLease, "lse_1")
	for name, test := range map[string]struct {
		watcher controlplane.Watcher
		want    []string
	}{
		"one key":         {one, []string{"lse_1"}},
		"the same again":  {two, []string{"lse_1"}},
		"all keys":        {all, []string{"lse_1", "lse_2"}},
		"another topic":   {other, []string{}},
		"a closed one":    {closed, []string{}},
		"a later watcher": {s.Watch(controlplane.TopicLease, ""), []string{}},
	} {
		t.Run(name, func(t *testing.T) {
			same(t, "ready", ready(test.watcher), len(test.want) > 0)
			same(t, "keys", test.watcher.Take(), test.want)
			same(t, "ready after", ready(test.watcher), false)
		})
	}
}

func watchNoneLost(t *testing.T, s controlplane.Store) {
	t.Helper()
	const writers, each = 8, 20
	w := s.Watch(controlplane.TopicScope, "")
	defer w.Close()
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			for j := range each {
				announce(t, s, controlplane.TopicScope, fmt.Sprintf("%d/%d", i, j))
			}
		})
	}
	var got []string
	for len(got) < writers*each {
		select {
		case <-w.C():
			got = append(got, w.Take()...)
		case <-t.Context().Done():
			t.Fatalf("got %d announcements of %d", len(got), writers*each)
		}
	}
	wg.Wait()
	slices.Sort(got)
	same(t, "different keys", len(slices.Compact(got)), writers*each)
}
