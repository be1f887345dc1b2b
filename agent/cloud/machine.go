package cloud

import (
	"slices"
	"time"

	"github.com/opendepot/depot/agent/provider"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// The labels that machines and volumes carry.
const (
	labelServer     = "server"
	labelAgent      = "agent"
	labelMachine    = "machine"
	labelProject    = "project"
	labelArch       = "arch"
	labelVolume     = "volume"
	labelGeneration = "generation"
	labelPool       = "pool"
)

// act is one thing that can be done to a machine or volume.
type act string

const (
	none             act = ""
	launch           act = "launch"
	stop             act = "stop"
	commit           act = "commit"
	bury             act = "bury" // note in the ledger that it is over
	destroy          act = "destroy"
	deleteVolume     act = "delete_volume"
	deleteGeneration act = "delete_generation"
)

// commitTries is how often a commit is tried before the end of the machine is
// reported without a generation: a cold build is better than none at all.
const commitTries = 6

// attempts is the memory of failures of one kind of act on one object.
type attempts struct {
	failures int
	next     time.Time // not before
	err      error     // the last
	final    bool      // another try cannot help
}

// failed notes a failure.
func (t *attempts) failed(now time.Time, err error, most time.Duration, random float64) {
	t.next = now.Add(backoff(t.failures, most, random))
	t.failures++
	t.err = err
}

// machine is all that the loop knows about one machine: what is ordered, what
// is seen, what is on record, and what is being done.
type machine struct {
	id    string
	order *depotv1.MachineOrder // nil: not ordered
	seen  *provider.Instance    // nil: not listed
	host  *backend              // where it is listed
	noted launchRecord

	doing     act      // none: nothing
	settled   uint64   // listings up to this number began before the last act ended
	try       attempts // of launch and destroy
	commits   attempts
	destroyed bool // by this process: no trace is left
}

// decide returns what to do next with m, or when to ask again (zero: when
// something changes). vol is its volume as it is seen, or nil. foreign says
// that m carries another control plane's id.
func (m *machine) decide(now time.Time, vol *provider.Volume, foreign bool) (act, time.Time) {
	if foreign || m.doing != none {
		return none, time.Time{}
	}
	a := m.wanted(vol)
	var after time.Time
	switch a {
	case launch, stop, destroy, bury:
		if m.try.final {
			return none, time.Time{}
		}
		after = m.try.next
	case commit:
		after = m.commits.next
	default:
	}
	if now.Before(after) {
		return none, after
	}
	return a, time.Time{}
}

// wanted is decide without the waiting.
func (m *machine) wanted(vol *provider.Volume) act {
	if m.mayCommit(vol) {
		return commit // whatever is ordered: nothing-lost
	}
	switch m.order.GetAction() {
	case depotv1.MachineOrder_ACTION_RUN:
		switch {
		case m.seen != nil || m.noted == ended:
			return none
		case m.noted == launched || m.noted == stopping:
			return bury // it was here, and is not
		default:
			return launch
		}
	case depotv1.MachineOrder_ACTION_STOP:
		switch {
		case m.seen == nil && m.noted != ended:
			return bury
		case m.running() && m.noted != stopping:
			return stop
		default:
			return none
		}
	case depotv1.MachineOrder_ACTION_DESTROY:
		if m.seen == nil && m.destroyed {
			return none
		}
		return destroy
	default: // not named: left alone
		return none
	}
}

func (m *machine) running() bool { return m.seen != nil && m.seen.State == provider.Running }

// mayCommit reports whether m left a tree that is to be committed.
func (m *machine) mayCommit(vol *provider.Volume) bool {
	return m.exitedCleanly() && !m.committed(vol) && m.uncommittable(vol) == ""
}

func (m *machine) exitedCleanly() bool {
	return m.seen != nil && m.seen.State == provider.Exited && m.seen.Exit != nil && m.seen.Exit.Clean
}

// committed reports whether the generation of m, which is seen, is on vol.
func (m *machine) committed(vol *provider.Volume) bool {
	return vol != nil && slices.ContainsFunc(vol.Generations, func(g provider.Generation) bool {
		return g.ID == m.seen.Labels[labelGeneration]
	})
}

// uncommittable says why m, which is seen, will never have a generation; empty
// if it has one or may still get one.
func (m *machine) uncommittable(vol *provider.Volume) string {
	switch {
	case m.seen.Labels[labelGeneration] == "":
		return "its generation is not known on this host"
	case vol == nil:
		return "its volume is not on this host any more"
	case vol.Writer != "" && vol.Writer != m.id:
		return "a later machine wrote its volume before it could be committed"
	case m.commits.failures >= commitTries:
		return "its volume could not be committed: " + m.commits.err.Error()
	}
	return ""
}

// report returns what the control plane is told of m, or nil for nothing.
func (m *machine) report(vol *provider.Volume, foreign bool) *depotv1.ObservedMachine {
	o := &depotv1.ObservedMachine{Id: m.id, VolumeId: m.order.GetLaunch().GetVolumeId()}
	ordered := m.order.GetAction()
	switch {
	case foreign && ordered == depotv1.MachineOrder_ACTION_RUN:
		o.State, o.Final = depotv1.ObservedMachine_STATE_BLOCKED, true
		o.Reason = "a machine of that id belongs to another control plane: remove it from the host first"
	case foreign:
		return nil
	case m.seen != nil:
		m.reportSeen(o, vol)
	case m.noted == ended && (ordered == depotv1.MachineOrder_ACTION_RUN || ordered == depotv1.MachineOrder_ACTION_STOP):
		o.State = depotv1.ObservedMachine_STATE_EXITED
		o.Reason = "nothing of it is on the host any more (the host was started anew, or it was removed)"
	case ordered == depotv1.MachineOrder_ACTION_RUN && m.try.err != nil:
		o.State, o.Reason, o.Final = depotv1.ObservedMachine_STATE_BLOCKED, m.try.err.Error(), m.try.final
	case m.doing == launch || m.doing == destroy || ordered == depotv1.MachineOrder_ACTION_DESTROY && !m.destroyed:
		// Absence would mean that nothing of it runs, and free its volume.
		o.State = depotv1.ObservedMachine_STATE_BLOCKED
		if m.try.err != nil {
			o.Reason = m.try.err.Error()
		}
	default:
		return nil
	}
	return o
}

func (m *machine) reportSeen(o *depotv1.ObservedMachine, vol *provider.Volume) {
	o.Address, o.VolumeId, o.Warnings = m.seen.Address, m.seen.Volume, m.seen.Warnings
	// A tree that is being committed is not free yet.
	o.State = depotv1.ObservedMachine_STATE_RUNNING
	if m.try.err != nil {
		o.Reason = m.try.err.Error() // of a destroy that goes on failing
	}
	if m.seen.State != provider.Exited || m.mayCommit(vol) {
		return
	}
	o.State, o.Address = depotv1.ObservedMachine_STATE_EXITED, ""
	switch {
	case !m.exitedCleanly():
		o.Reason = "it ended without a word"
		if m.seen.Exit != nil && m.seen.Exit.Reason != "" {
			o.Reason = m.seen.Exit.Reason
		}
	case m.committed(vol):
		o.Clean, o.GenerationId = true, m.seen.Labels[labelGeneration]
	default:
		o.Clean, o.Reason = true, m.uncommittable(vol)
	}
}
