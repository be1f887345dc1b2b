package store

import (
	"slices"
	"sync"

	"github.com/opendepot/depot/controlplane"
)

// watches are the watchers of a store.
type watches struct {
	mu sync.Mutex // guards by and what its watchers hold
	// by has an entry for each topic and key that someone watches.
	by map[note]map[*watcher]struct{}
}

// watcher implements [controlplane.Watcher].
type watcher struct {
	all  *watches
	what note // its key is empty for a watcher of all keys
	c    chan struct{}
	keys map[string]struct{}
}

func (w *watches) add(topic controlplane.Topic, key string) *watcher {
	one := &watcher{
		all:  w,
		what: note{topic, key},
		c:    make(chan struct{}, 1),
		keys: make(map[string]struct{}),
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.by == nil {
		w.by = make(map[note]map[*watcher]struct{})
	}
	if w.by[one.what] == nil {
		w.by[one.what] = make(map[*watcher]struct{})
	}
	w.by[one.what][one] = struct{}{}
	return one
}

// deliver hands changes to those who watch them. It never waits for anyone.
func (w *watches) deliver(changes []note) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range changes {
		for _, what := range []note{n, {topic: n.topic}} {
			for one := range w.by[what] {
				one.keys[n.key] = struct{}{}
				one.wake()
			}
		}
	}
}

// wake makes C ready, if it is not.
func (o *watcher) wake() {
	select {
	case o.c <- struct{}{}:
	default:
	}
}

// C receives when there is something to take.
func (o *watcher) C() <-chan struct{} { return o.c }

// Take returns the keys announced since the last Take, sorted.
func (o *watcher) Take() []string {
	o.all.mu.Lock()
	defer o.all.mu.Unlock()
	select {
	case <-o.c: // the signal goes with the keys that it stands for
	default:
	}
	keys := make([]string, 0, len(o.keys))
	for k := range o.keys {
		keys = append(keys, k)
	}
	clear(o.keys)
	slices.Sort(keys)
	return keys
}

// Close ends the watcher: nothing is collected any more.
func (o *watcher) Close() {
	o.all.mu.Lock()
	defer o.all.mu.Unlock()
	watching := o.all.by[o.what]
	delete(watching, o)
	if len(watching) == 0 {
		delete(o.all.by, o.what)
	}
}
