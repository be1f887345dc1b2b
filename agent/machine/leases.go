package machine

import (
	"cmp"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/internal/mtls"
)

// leases decides which clients may in, and counts those that are.
type leases struct {
	machine string
	changed func() // called, without mu, after each change of a count

	mu     sync.Mutex // guards all below
	server string     // the control plane's id, once it is known
	closed string     // why nobody may in; empty once the machine is ready
	ended  map[string]struct{}
	counts map[string]*leaseCount
	open   int
}

type leaseCount struct {
	total int64
	next  int                 // key of cuts
	cuts  map[int]func(error) // of the open connections
}

// The errors of admission.
var (
	errLeaseEnded = errors.New("the lease has ended")
	errClosed     = errors.New("the machine takes no connections")
)

// notAdmitted is a refusal with what the log shall name.
type notAdmitted struct {
	name mtls.LeafName
	err  error
}

func (e *notAdmitted) Error() string { return e.err.Error() }
func (e *notAdmitted) Unwrap() error { return e.err }

func newLeases(machine, server string, changed func()) *leases {
	return &leases{
		machine: machine,
		server:  server,
		changed: changed,
		closed:  "it is starting",
		ended:   map[string]struct{}{},
		counts:  map[string]*leaseCount{},
	}
}

// admit is the rule of own-lease: a leaf that was verified opens this machine
// alone, for a lease that has not ended.
func (l *leases) admit(leaf *x509.Certificate) error {
	name, err := mtls.ParseLeafName(leaf)
	if err != nil {
		return &notAdmitted{err: err}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.check(name); err != nil {
		return &notAdmitted{name: name, err: err}
	}
	return nil
}

func (l *leases) check(name mtls.LeafName) error {
	if l.closed != "" {
		return fmt.Errorf("%w: %s", errClosed, l.closed)
	}
	if name.Server != l.server {
		return fmt.Errorf("the certificate is for the control plane %s, this machine belongs to %s", name.Server, l.server)
	}
	if name.Machine != l.machine {
		return fmt.Errorf("the certificate opens the machine %s, this is %s", name.Machine, l.machine)
	}
	if _, ok := l.ended[name.Lease]; ok {
		return fmt.Errorf("%w: %s", errLeaseEnded, name.Lease)
	}
	return nil
}

// enter counts a connection until the returned function is called; cut is
// called when the connection shall end before its time. The rule is asked once
// more: the lease may have ended during the handshake.
func (l *leases) enter(name mtls.LeafName, cut func(error)) (leave func(), err error) {
	l.mu.Lock()
	if err := l.check(name); err != nil {
		l.mu.Unlock()
		return nil, &notAdmitted{name: name, err: err}
	}
	count := l.counts[name.Lease]
	if count == nil {
		count = &leaseCount{cuts: map[int]func(error){}}
		l.counts[name.Lease] = count
	}
	count.total++
	count.next++
	key := count.next
	count.cuts[key] = cut
	l.open++
	l.mu.Unlock()
	l.changed()
	return func() {
		l.mu.Lock()
		delete(count.cuts, key)
		l.open--
		l.mu.Unlock()
		l.changed()
	}, nil
}

// setEnded replaces the set of ended leases and cuts their connections.
func (l *leases) setEnded(ids []string) {
	l.mu.Lock()
	var cuts []func(error)
	l.ended = make(map[string]struct{}, len(ids))
	for _, id := range ids {
		l.ended[id] = struct{}{}
		if count := l.counts[id]; count != nil {
			for _, cut := range count.cuts {
				cuts = append(cuts, cut)
			}
		}
	}
	l.mu.Unlock()
	for _, cut := range cuts {
		cut(errLeaseEnded)
	}
}

// allow lets clients in from now on.
func (l *leases) allow(server string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.server, l.closed = server, ""
}

// deny lets nobody in from now on, and leaves those that are.
func (l *leases) deny(why string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = why
}

// denied returns why nobody may in, or "".
func (l *leases) denied() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}

// cutAll ends every connection.
func (l *leases) cutAll(why error) {
	l.mu.Lock()
	var cuts []func(error)
	for _, count := range l.counts {
		for _, cut := range count.cuts {
			cuts = append(cuts, cut)
		}
	}
	l.mu.Unlock()
	for _, cut := range cuts {
		cut(why)
	}
}

// connections returns how many are open.
func (l *leases) connections() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.open
}

// report returns the counts of all leases that have had a connection, in the
// order of their ids. A lease that has ended and has none left is forgotten.
func (l *leases) report() []*depotv1.LeaseConnections {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []*depotv1.LeaseConnections
	for id, count := range l.counts {
		if _, ended := l.ended[id]; ended && len(count.cuts) == 0 {
			delete(l.counts, id)
			continue
		}
		out = append(out, &depotv1.LeaseConnections{
			LeaseId: id,
			Open:    int32(len(count.cuts)), //nolint:gosec // far below 2^31
			Total:   count.total,
		})
	}
	slices.SortFunc(out, func(a, b *depotv1.LeaseConnections) int { return cmp.Compare(a.LeaseId, b.LeaseId) })
	return out
}
