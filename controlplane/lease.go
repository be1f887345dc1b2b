package controlplane

import (
	"fmt"
	"time"
)

// LeaseState is where a lease is in its life:
// waiting → ready → ended, or waiting → ended.
type LeaseState string

// The states of a lease.
const (
	LeaseWaiting LeaseState = "waiting"
	LeaseReady   LeaseState = "ready"
	LeaseEnded   LeaseState = "ended"
)

// LeaseEnd says why a lease ended.
type LeaseEnd string

// The ends of a lease.
const (
	EndReleased    LeaseEnd = "released"
	EndExpired     LeaseEnd = "expired"
	EndCancelled   LeaseEnd = "cancelled"
	EndRevoked     LeaseEnd = "revoked"
	EndMachineLost LeaseEnd = "machine_lost"
	// EndRefused ends a waiting lease that cannot be served as things are.
	EndRefused LeaseEnd = "refused"
)

// Lease is one client process's claim on one machine, for one architecture.
type Lease struct {
	ID        string // made by the client
	Project   string
	Arch      string
	Isolated  bool
	Principal string // the principal's id
	// PrincipalName is for listings.
	PrincipalName string
	// Key is the SHA-256 of the client's public key (SubjectPublicKeyInfo).
	Key []byte
	// Seq is the order among leases, given by the store when it is first put.
	Seq   int64
	State LeaseState
	// Machine is the machine that it is assigned to: an intent while waiting,
	// a fact once ready.
	Machine string
	// Queued says that a waiting lease waits for room in a pool: it stands in
	// the one queue of its architecture, by Seq.
	Queued bool
	// Reason says what a waiting lease waits for, or why an ended one ended.
	Reason string
	End    LeaseEnd
	// Connections is how many client connections the machine reports; Connected
	// says that there was one.
	Connections int
	Connected   bool
	Created     time.Time
	// Polled is when a waiting lease was last asked for.
	Polled time.Time
	// Ready is when it was assigned; Renewed when it was last renewed; Quiet
	// since when a connected lease has had no connection.
	Ready   time.Time
	Renewed time.Time
	Quiet   time.Time
	Ended   time.Time
	// CancelRefs are BuildKit refs that someone asked to cancel.
	CancelRefs []string
	// CertificateUntil is when the newest certificate of the lease expires.
	CertificateUntil time.Time
}

// Times are the durations of the protocol.
type Times struct {
	// LeaseTTL is how long a ready lease lives after a renewal.
	LeaseTTL time.Duration
	// LeaseRenew is how often a client renews.
	LeaseRenew time.Duration
	// WaitTTL is how long a waiting lease lives after its last poll.
	WaitTTL time.Duration
	// ConnectTTL is how long a ready lease may take to its first connection.
	ConnectTTL time.Duration
	// QuietTTL ends a lease that was connected, and has neither a connection
	// nor a renewal for so long.
	QuietTTL time.Duration
	// Launch is how long a machine may be pending after its agent was first
	// asked; Register how long it may take from launched to ready.
	Launch   time.Duration
	Register time.Duration
	// Drain is how long a draining machine may take before it is destroyed,
	// counted from its last connection.
	Drain time.Duration
	// AgentSilent is how long an agent may be silent before messages name it.
	AgentSilent time.Duration
	// KeepEnded is how long leases, machines and generations are listed after
	// their end; it is longer than a certificate lives.
	KeepEnded time.Duration
	// Hang is how long a hanging call is held at most.
	Hang time.Duration
	// ClientCertificate, MachineCertificate and Backdate are certificates'
	// lifetimes and how far their start lies in the past.
	ClientCertificate  time.Duration
	MachineCertificate time.Duration
	Backdate           time.Duration
}

// DefaultTimes are the times that docs/architecture.md names.
func DefaultTimes() Times {
	return Times{
		LeaseTTL:           time.Minute,
		LeaseRenew:         20 * time.Second,
		WaitTTL:            35 * time.Second,
		ConnectTTL:         time.Minute,
		QuietTTL:           10 * time.Second,
		Launch:             2 * time.Minute,
		Register:           2 * time.Minute,
		Drain:              2 * time.Minute,
		AgentSilent:        10 * time.Second,
		KeepEnded:          30 * 24 * time.Hour,
		Hang:               25 * time.Second,
		ClientCertificate:  time.Hour,
		MachineCertificate: 24 * time.Hour,
		Backdate:           5 * time.Minute,
	}
}

// Live reports whether the lease has not ended.
func (l Lease) Live() bool { return l.State != LeaseEnded }

// Expires returns when the lease ends if nothing more is heard of it, and zero
// for one that lives as long as its connection does. started is when the
// control plane started: what was last heard of a lease before that says
// nothing, so such a lease gets one TTL from there (builds-survive).
func (l Lease) Expires(t Times, started time.Time) time.Time {
	var heard time.Time
	var ttl time.Duration
	switch {
	case l.State == LeaseEnded:
		return l.Ended
	case l.State == LeaseWaiting:
		heard, ttl = l.Polled, t.WaitTTL
	case l.Connections > 0:
		return time.Time{}
	case !l.Connected:
		heard, ttl = l.Ready, t.ConnectTTL
	case l.Renewed.After(l.Quiet):
		// Alive without a connection: it may miss one renewal by QuietTTL.
		heard, ttl = l.Renewed, t.LeaseRenew+t.QuietTTL
	default:
		heard, ttl = l.Quiet, t.QuietTTL
	}
	if heard.Before(started) {
		return started.Add(t.LeaseTTL)
	}
	return heard.Add(ttl)
}

// Finish returns l ended at now for why, with words for people.
func (l Lease) Finish(now time.Time, why LeaseEnd, reason string) Lease {
	l.State, l.End, l.Reason, l.Ended = LeaseEnded, why, reason, now
	l.Connections = 0
	return l
}

// Same reports with a Denied error when a repeated request for l's id comes
// with something else than the first.
func (l Lease) Same(r Lease) error {
	differs := ""
	switch {
	case l.Principal != r.Principal:
		differs = "principal"
	case l.Project != r.Project:
		differs = "project"
	case l.Arch != r.Arch:
		differs = "architecture"
	case l.Isolated != r.Isolated:
		differs = "isolation"
	case string(l.Key) != string(r.Key):
		differs = "key"
	default:
		return nil
	}
	return &Error{
		Code:    Denied,
		Message: fmt.Sprintf("lease %s was asked for with another %s: use a new lease id", l.ID, differs),
	}
}
