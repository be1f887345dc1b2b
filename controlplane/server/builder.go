package server

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/internal/mtls"
)

// builderService answers drivers.
type builderService struct{ s *Server }

// project returns the project that ref names, if the caller has right on it.
// One that the caller may not see is not told from one that does not exist.
func (s *Server) project(ctx context.Context, tx controlplane.Tx, ref *depotv1.ProjectRef, right controlplane.Right) (controlplane.Project, error) {
	p := caller(ctx)
	project, err := s.lookupProject(ctx, tx, ref, p)
	if err != nil {
		return project, err
	}
	if !p.May(controlplane.RightView, project) {
		return project, unknownProject(ref)
	}
	if !p.May(right, project) {
		return project, controlplane.Errorf(controlplane.Denied, "%s %q may not %s in project %q: its role is %s", p.Kind, p.Name, right, project.Name, p.Role)
	}
	return project, nil
}

func (s *Server) lookupProject(ctx context.Context, tx controlplane.Tx, ref *depotv1.ProjectRef, p controlplane.Principal) (controlplane.Project, error) {
	switch {
	case ref.GetId() != "":
		project, err := tx.Project(ctx, ref.GetId())
		if controlplane.CodeOf(err) == controlplane.NotFound {
			return project, unknownProject(ref)
		}
		return project, err
	case ref.GetName() == "" && p.Project != "":
		return tx.Project(ctx, p.Project)
	case ref.GetName() == "":
		return controlplane.Project{}, controlplane.Errorf(controlplane.Invalid, "no project is named: give one as organization/project, or set DEPOT_PROJECT_ID")
	}
	org, err := s.organization(ctx, tx, ref.GetOrganization())
	if controlplane.CodeOf(err) == controlplane.NotFound {
		return controlplane.Project{}, unknownProject(ref)
	}
	if err != nil {
		return controlplane.Project{}, err
	}
	project, err := tx.ProjectByName(ctx, org.ID, ref.GetName())
	if controlplane.CodeOf(err) == controlplane.NotFound {
		return project, unknownProject(ref)
	}
	return project, err
}

// organization returns the organization of that name, or the caller's only one
// if it is empty. One that the caller is not in is not told from one that does
// not exist.
func (s *Server) organization(ctx context.Context, tx controlplane.Tx, name string) (controlplane.Organization, error) {
	p := caller(ctx)
	if name != "" {
		org, err := tx.OrganizationByName(ctx, name)
		if controlplane.CodeOf(err) == controlplane.NotFound || err == nil && !p.Operator() && org.ID != p.Org {
			return org, controlplane.Errorf(controlplane.NotFound, "organization %q does not exist, or your token may not see it: leave it out to use your own", name)
		}
		return org, err
	}
	if p.Org != "" {
		return tx.Organization(ctx, p.Org)
	}
	all, err := tx.Organizations(ctx)
	if err != nil {
		return controlplane.Organization{}, err
	}
	if len(all) != 1 {
		return controlplane.Organization{}, controlplane.Errorf(controlplane.Invalid, "there are %d organizations: name one, as organization/project", len(all))
	}
	return all[0], nil
}

func unknownProject(ref *depotv1.ProjectRef) error {
	name := ref.GetId()
	if name == "" {
		name = ref.GetName()
		if ref.GetOrganization() != "" {
			name = ref.GetOrganization() + "/" + name
		}
	}
	return controlplane.Errorf(controlplane.NotFound, "project %q does not exist, or your token may not see it: see `docker depot project ls`", name)
}

// GetBuilder tells which architectures the project can build on.
func (b *builderService) GetBuilder(ctx context.Context, req *depotv1.GetBuilderRequest) (*depotv1.GetBuilderResponse, error) {
	resp := &depotv1.GetBuilderResponse{ServerVersion: b.s.Version, ServerTime: stamp(b.s.Now())}
	err := b.s.Store.View(ctx, func(tx controlplane.Tx) error {
		project, err := b.s.project(ctx, tx, req.GetProject(), controlplane.RightView)
		if err != nil {
			return err
		}
		org, err := tx.Organization(ctx, project.Org)
		if err != nil {
			return err
		}
		resp.ProjectId, resp.Project = project.ID, org.Name+"/"+project.Name
		resp.Architectures, err = architectures(ctx, tx, project.ID)
		return err
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// architectures lists those that have a pool, the native ones first.
func architectures(ctx context.Context, tx controlplane.Tx, project string) ([]*depotv1.Architecture, error) {
	var native, emulated []*depotv1.Architecture
	for _, arch := range controlplane.Arches() {
		pools, err := tx.Pools(ctx, arch)
		if err != nil {
			return nil, err
		}
		if len(pools) == 0 {
			continue
		}
		a := &depotv1.Architecture{Name: arch}
		machines, err := tx.ScopeMachines(ctx, controlplane.Scope{Project: project, Arch: arch})
		if err != nil {
			return nil, err
		}
		for _, m := range machines {
			if !m.Over() && !m.Isolated && (a.MachineId == "" || m.State == controlplane.MachineReady) {
				a.MachineId, a.MachineState = m.ID, machineState(m.State)
			}
		}
		if slices.ContainsFunc(pools, func(p controlplane.Pool) bool { return !p.Emulated }) {
			native = append(native, a)
		} else {
			a.Emulated = true
			emulated = append(emulated, a)
		}
	}
	return append(native, emulated...), nil
}

// AcquireLease stores the lease at its first call and hangs until it is ready,
// has ended, or waits for something else than before.
func (b *builderService) AcquireLease(ctx context.Context, req *depotv1.AcquireLeaseRequest) (*depotv1.AcquireLeaseResponse, error) {
	s := b.s
	want, err := b.wanted(ctx, req)
	if err != nil {
		return nil, err
	}
	watcher := s.Store.Watch(controlplane.TopicLease, want.ID)
	defer watcher.Close()
	lease, err := b.askFor(ctx, req, want)
	if err != nil {
		return nil, err
	}
	timeout := time.NewTimer(s.Times.Hang)
	defer timeout.Stop()
	for reason := lease.Reason; lease.State == controlplane.LeaseWaiting && lease.Reason == reason; {
		if !hang(ctx, watcher, timeout.C) {
			break
		}
		if lease, err = s.lease(ctx, want.ID); err != nil {
			return nil, err
		}
	}
	resp := &depotv1.AcquireLeaseResponse{
		State:      leaseState(lease.State),
		Reason:     lease.Reason,
		RenewEvery: durationpb.New(s.Times.LeaseRenew),
	}
	if lease.State == controlplane.LeaseReady {
		if err := b.admit(ctx, req, lease, resp); err != nil {
			return nil, err
		}
	}
	resp.ServerTime = stamp(s.Now())
	resp.Expires = stamp(lease.Expires(s.Times, time.Time{}))
	return resp, nil
}

// wanted checks the request and returns the lease that it asks for.
func (b *builderService) wanted(ctx context.Context, req *depotv1.AcquireLeaseRequest) (controlplane.Lease, error) {
	p := caller(ctx)
	want := controlplane.Lease{
		ID: req.GetLeaseId(), Arch: req.GetArch(), Isolated: req.GetIsolated() || p.Isolated,
		Principal: p.ID, PrincipalName: p.Name, State: controlplane.LeaseWaiting,
	}
	if !controlplane.ValidID(controlplane.KindLease, want.ID) {
		return want, controlplane.Errorf(controlplane.Invalid, "lease id %q is not valid: it is lse_ and 32 hexadecimal digits", want.ID)
	}
	if !slices.Contains(controlplane.Arches(), want.Arch) {
		return want, controlplane.Errorf(controlplane.Invalid, "architecture %q is not known: use one of %v", want.Arch, controlplane.Arches())
	}
	var err error
	want.Key, err = b.s.Authority.KeyHash(req.GetCsr())
	return want, err
}

// askFor stores the lease, or notes that it is still wanted.
func (b *builderService) askFor(ctx context.Context, req *depotv1.AcquireLeaseRequest, want controlplane.Lease) (controlplane.Lease, error) {
	var lease controlplane.Lease
	err := b.s.Store.Update(ctx, func(tx controlplane.Tx) error {
		if err := stillKnown(ctx, tx); err != nil {
			return err
		}
		project, err := b.s.project(ctx, tx, req.GetProject(), controlplane.RightBuild)
		if err != nil {
			return err
		}
		want.Project = project.ID
		now := b.s.Now()
		lease, err = tx.Lease(ctx, want.ID)
		switch {
		case controlplane.CodeOf(err) == controlplane.NotFound:
			if err := canServe(ctx, tx, project, want, req.GetLaunch()); err != nil {
				return err
			}
			if err := roomForLease(ctx, tx, project, want); err != nil {
				return err
			}
			lease = want
			lease.Created = now
			tx.Announce(controlplane.TopicScope, scopeOf(lease).String())
		case err != nil:
			return err
		default:
			if err := lease.Same(want); err != nil {
				return err
			}
			if lease.State != controlplane.LeaseWaiting {
				return nil
			}
		}
		lease.Polled = now
		lease, err = tx.PutLease(ctx, lease)
		return err
	})
	return lease, err
}

// maxLeases bounds the live leases of a project and architecture. Each plan of
// the scope reads all of them, so one token that asks without end would hold up
// everybody else.
const maxLeases = 1000

func roomForLease(ctx context.Context, tx controlplane.Tx, project controlplane.Project, want controlplane.Lease) error {
	n, err := tx.ScopeLeases(ctx, scopeOf(want))
	if err != nil || n < maxLeases {
		return err
	}
	return controlplane.Errorf(controlplane.Exhausted, "project %q has %d %s builds that run or wait, which is the most: try again when some have ended", project.Name, n, want.Arch)
}

func scopeOf(l controlplane.Lease) controlplane.Scope {
	return controlplane.Scope{Project: l.Project, Arch: l.Arch}
}

// canServe refuses a lease that nothing could ever serve, or, with launch
// unset, that nothing serves now.
func canServe(ctx context.Context, tx controlplane.Tx, project controlplane.Project, want controlplane.Lease, launch bool) error {
	pools, err := tx.Pools(ctx, want.Arch)
	if err != nil {
		return err
	}
	if len(pools) == 0 {
		return controlplane.Errorf(controlplane.Precondition, "project %q has no %s pool: start an agent with --pool arch=%s, or build with another --platform", project.Name, want.Arch, want.Arch)
	}
	if want.Isolated && !slices.ContainsFunc(pools, func(p controlplane.Pool) bool { return p.Isolated }) {
		return controlplane.Errorf(controlplane.Precondition, "no %s pool runs isolated machines: ask an operator for one, or build without isolation", want.Arch)
	}
	if launch {
		return nil
	}
	machines, err := tx.ScopeMachines(ctx, scopeOf(want))
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(machines, func(m controlplane.Machine) bool { return m.State == controlplane.MachineReady }) {
		return controlplane.Errorf(controlplane.Precondition, "project %q has no %s machine running: a build starts one", project.Name, want.Arch)
	}
	return nil
}

// lease reads one lease.
func (s *Server) lease(ctx context.Context, id string) (lease controlplane.Lease, err error) {
	err = s.Store.View(ctx, func(tx controlplane.Tx) error {
		lease, err = tx.Lease(ctx, id)
		return err
	})
	return lease, err
}

// admit fills in how the ready lease's client reaches its machine.
func (b *builderService) admit(ctx context.Context, req *depotv1.AcquireLeaseRequest, lease controlplane.Lease, resp *depotv1.AcquireLeaseResponse) error {
	var m controlplane.Machine
	var project controlplane.Project
	err := b.s.Store.View(ctx, func(tx controlplane.Tx) (err error) {
		if m, err = tx.Machine(ctx, lease.Machine); err != nil {
			return err
		}
		if project, err = tx.Project(ctx, lease.Project); err != nil {
			return err
		}
		resp.Notices, err = notices(ctx, tx, m)
		return err
	})
	if err != nil {
		return err
	}
	resp.Endpoint = &depotv1.Endpoint{
		MachineId: m.ID, Address: m.Address, ServerName: m.ServerName(),
		TrustAnchors: [][]byte{project.Authority.Certificate}, Emulated: m.Emulated,
	}
	resp.Certificate, err = b.certify(ctx, project, lease, req.GetCsr())
	return err
}

// notices are what the user should know before the build begins.
func notices(ctx context.Context, tx controlplane.Tx, m controlplane.Machine) ([]string, error) {
	var out []string
	if m.Emulated {
		out = append(out, fmt.Sprintf("%s is emulated on this machine: expect it to be several times slower than native", m.Arch))
	}
	generations, err := tx.Generations(ctx, m.Volume)
	if err != nil {
		return nil, err
	}
	for _, g := range generations {
		if g.ID == m.Generation || g.State == controlplane.GenerationOpen {
			continue
		}
		if g.State == controlplane.GenerationLost {
			out = append(out, fmt.Sprintf("the host lost the saved cache (generation %s): this build starts cold", g.ID))
		}
		break
	}
	return out, nil
}

// certify signs the client's certificate, and notes until when it is good.
func (b *builderService) certify(ctx context.Context, project controlplane.Project, lease controlplane.Lease, csr []byte) (*depotv1.Certificate, error) {
	s := b.s
	now := s.Now()
	name := mtls.LeafName{Server: s.Record.ID, Lease: lease.ID, Machine: lease.Machine}
	leaf := controlplane.Leaf{
		CSR: csr, Usage: controlplane.UsageClient,
		NotBefore: now.Add(-s.Times.Backdate), NotAfter: now.Add(s.Times.ClientCertificate),
	}
	for _, u := range name.URIs() {
		leaf.URIs = append(leaf.URIs, u.String())
	}
	issued, err := s.Authority.Sign(ctx, project.Authority, project.ID, leaf)
	if err != nil {
		return nil, err
	}
	err = s.Store.Update(ctx, func(tx controlplane.Tx) error {
		l, err := tx.Lease(ctx, lease.ID)
		if err != nil {
			return err
		}
		if l.State != controlplane.LeaseReady {
			// Nobody told the machine of it: at its end it had no certificate. The
			// client asks again and is told the end.
			return controlplane.Errorf(controlplane.Unavailable, "lease %s has just ended: %s", l.ID, l.Reason)
		}
		l.CertificateUntil = issued.NotAfter
		_, err = tx.PutLease(ctx, l)
		return err
	})
	if err != nil {
		return nil, err
	}
	return wireCertificate(issued, now), nil
}

// RenewLease keeps a lease, and tells what became of it.
func (b *builderService) RenewLease(ctx context.Context, req *depotv1.RenewLeaseRequest) (*depotv1.RenewLeaseResponse, error) {
	s := b.s
	watcher := s.Store.Watch(controlplane.TopicLease, req.GetLeaseId())
	defer watcher.Close()
	var lease controlplane.Lease
	var project controlplane.Project
	err := s.Store.Update(ctx, func(tx controlplane.Tx) (err error) {
		if lease, err = s.ownLease(ctx, tx, req.GetLeaseId()); err != nil {
			return err
		}
		if project, err = tx.Project(ctx, lease.Project); err != nil && lease.Live() {
			return err
		}
		if lease.State != controlplane.LeaseReady {
			return nil
		}
		lease.Renewed = s.Now()
		tx.Announce(controlplane.TopicScope, scopeOf(lease).String())
		lease, err = tx.PutLease(ctx, lease)
		return err
	})
	if err != nil {
		return nil, err
	}
	resp := &depotv1.RenewLeaseResponse{TrustAnchors: [][]byte{project.Authority.Certificate}}
	if len(req.GetCsr()) > 0 && lease.State == controlplane.LeaseReady {
		if resp.Certificate, err = b.certify(ctx, project, lease, req.GetCsr()); err != nil {
			return nil, err
		}
	}
	timeout := time.NewTimer(s.Times.LeaseRenew)
	defer timeout.Stop()
	for req.GetWait() && resp.GetCertificate() == nil && lease.State == controlplane.LeaseReady && len(lease.CancelRefs) == 0 {
		if !hang(ctx, watcher, timeout.C) {
			break
		}
		if lease, err = s.lease(ctx, lease.ID); err != nil {
			return nil, err
		}
	}
	resp.State = leaseState(lease.State)
	resp.Reason = lease.Reason
	resp.CancelRefs = lease.CancelRefs
	resp.ServerTime = stamp(s.Now())
	resp.Expires = stamp(lease.Expires(s.Times, time.Time{}))
	return resp, nil
}

// ownLease returns a lease of the caller's.
func (s *Server) ownLease(ctx context.Context, tx controlplane.Tx, id string) (controlplane.Lease, error) {
	lease, err := tx.Lease(ctx, id)
	if controlplane.CodeOf(err) == controlplane.NotFound || err == nil && lease.Principal != caller(ctx).ID {
		return lease, controlplane.Errorf(controlplane.NotFound, "lease %s does not exist: ask for a new one", id)
	}
	return lease, err
}

// ReleaseLease ends a lease of the caller's.
func (b *builderService) ReleaseLease(ctx context.Context, req *depotv1.ReleaseLeaseRequest) (*depotv1.ReleaseLeaseResponse, error) {
	err := b.s.Store.Update(ctx, func(tx controlplane.Tx) error {
		lease, err := b.s.ownLease(ctx, tx, req.GetLeaseId())
		if controlplane.CodeOf(err) == controlplane.NotFound {
			return nil
		}
		if err != nil || !lease.Live() {
			return err
		}
		return b.s.endLease(ctx, tx, lease, controlplane.EndReleased, "released by its client")
	})
	if err != nil {
		return nil, err
	}
	return &depotv1.ReleaseLeaseResponse{}, nil
}

// endLease stores a lease's end and wakes all whom it concerns.
func (s *Server) endLease(ctx context.Context, tx controlplane.Tx, l controlplane.Lease, why controlplane.LeaseEnd, reason string) error {
	queued := l.Queued
	if _, err := tx.PutLease(ctx, l.Finish(s.Now(), why, reason)); err != nil {
		return err
	}
	tx.Announce(controlplane.TopicLease, l.ID)
	tx.Announce(controlplane.TopicScope, scopeOf(l).String())
	if l.Machine != "" {
		tx.Announce(controlplane.TopicMachine, l.Machine)
	}
	if queued {
		return controlplane.WakeQueue(ctx, tx, l.Arch)
	}
	return nil
}
