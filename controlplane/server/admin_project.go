package server

import (
	"context"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// CreateProject makes a project with its own certificate authority.
func (a *adminService) CreateProject(ctx context.Context, req *depotv1.CreateProjectRequest) (*depotv1.CreateProjectResponse, error) {
	s := a.s
	project := applySettings(controlplane.Project{
		Name: req.GetName(), Size: controlplane.DefaultSize, IdleTimeout: controlplane.DefaultIdleTimeout, MaxMachines: 1,
		CacheKeep: controlplane.DefaultCacheKeep, CacheBytes: controlplane.DefaultCacheBytes, Created: s.Now(),
	}, req.GetSettings())
	if err := project.Validate(s.Sizes); err != nil {
		return nil, err
	}
	project.ID = s.newID(controlplane.KindProject)
	var err error
	if project.Authority, err = s.Authority.NewAuthority(project.ID, "depot project "+project.ID); err != nil {
		return nil, err
	}
	var org controlplane.Organization
	err = s.Store.Update(ctx, func(tx controlplane.Tx) (err error) {
		if org, err = s.organization(ctx, tx, req.GetOrganization()); err != nil {
			return err
		}
		if p := caller(ctx); !p.MayOrg(controlplane.RightAdmin, org.ID) {
			return controlplane.Errorf(controlplane.Denied, "%s %q may not make projects in organization %q", p.Kind, p.Name, org.Name)
		}
		project.Org = org.ID
		project.Request = req.GetRequestId()
		known, err := projectOfRequest(ctx, tx, org, project)
		if err != nil || known.ID != "" {
			project = known
			return err
		}
		return tx.PutProject(ctx, project)
	})
	if err != nil {
		return nil, err
	}
	s.Log.InfoContext(ctx, "project created", "project", project.ID, "org", org.ID, "principal", caller(ctx).ID)
	return &depotv1.CreateProjectResponse{Project: wireProject(project, org.Name)}, nil
}

// projectOfRequest returns the project that the request of want made before;
// none has no id. A name or a request's id that is another project's is
// refused.
func projectOfRequest(ctx context.Context, tx controlplane.Tx, org controlplane.Organization, want controlplane.Project) (controlplane.Project, error) {
	projects, err := tx.Projects(ctx, org.ID)
	if err != nil {
		return controlplane.Project{}, err
	}
	for _, p := range projects {
		repeated := want.Request != "" && p.Request == want.Request
		switch {
		case repeated && p.Name == want.Name:
			return p, nil
		case repeated:
			return controlplane.Project{}, controlplane.Errorf(controlplane.Denied, "request %s made project %q before: use a new request id for project %q", want.Request, p.Name, want.Name)
		case p.Name == want.Name:
			return controlplane.Project{}, controlplane.Errorf(controlplane.Exists, "project %q exists already in organization %q: choose another name, or use it", p.Name, org.Name)
		}
	}
	return controlplane.Project{}, nil
}

// ListProjects lists the projects that the caller may see, by name.
func (a *adminService) ListProjects(ctx context.Context, req *depotv1.ListProjectsRequest) (*depotv1.ListProjectsResponse, error) {
	var resp *depotv1.ListProjectsResponse
	err := a.s.Store.View(ctx, func(tx controlplane.Tx) error {
		resp = &depotv1.ListProjectsResponse{}
		only := ""
		if req.GetOrganization() != "" {
			org, err := a.s.organization(ctx, tx, req.GetOrganization())
			if err != nil {
				return err
			}
			only = org.ID
		}
		projects, err := tx.Projects(ctx, only)
		if err != nil {
			return err
		}
		for _, p := range projects {
			if !caller(ctx).May(controlplane.RightView, p) {
				continue
			}
			org, _, err := names(ctx, tx, p.Org, "")
			if err != nil {
				return err
			}
			resp.Projects = append(resp.Projects, wireProject(p, org))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// GetProject returns one project.
func (a *adminService) GetProject(ctx context.Context, req *depotv1.GetProjectRequest) (*depotv1.GetProjectResponse, error) {
	resp := &depotv1.GetProjectResponse{}
	err := a.s.Store.View(ctx, func(tx controlplane.Tx) error {
		p, err := a.s.project(ctx, tx, req.GetProject(), controlplane.RightView)
		if err != nil {
			return err
		}
		org, _, err := names(ctx, tx, p.Org, "")
		resp.Project = wireProject(p, org)
		return err
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// UpdateProject changes the settings that are set, all or none.
func (a *adminService) UpdateProject(ctx context.Context, req *depotv1.UpdateProjectRequest) (*depotv1.UpdateProjectResponse, error) {
	resp := &depotv1.UpdateProjectResponse{}
	err := a.s.Store.Update(ctx, func(tx controlplane.Tx) error {
		p, err := a.s.project(ctx, tx, req.GetProject(), controlplane.RightAdmin)
		if err != nil {
			return err
		}
		p = applySettings(p, req.GetSettings())
		if err := p.Validate(a.s.Sizes); err != nil {
			return err
		}
		if err := tx.PutProject(ctx, p); err != nil {
			return err
		}
		announceProject(tx, p)
		org, _, err := names(ctx, tx, p.Org, "")
		resp.Project = wireProject(p, org)
		return err
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func announceProject(tx controlplane.Tx, p controlplane.Project) {
	for _, arch := range controlplane.Arches() {
		tx.Announce(controlplane.TopicScope, controlplane.Scope{Project: p.ID, Arch: arch}.String())
	}
}

// DeleteProject deletes the project; the scheduler ends its leases and drains
// its machines, and its volumes become tombstones.
func (a *adminService) DeleteProject(ctx context.Context, req *depotv1.DeleteProjectRequest) (*depotv1.DeleteProjectResponse, error) {
	s := a.s
	err := s.Store.Update(ctx, func(tx controlplane.Tx) error {
		p, err := s.project(ctx, tx, req.GetProject(), controlplane.RightAdmin)
		if err != nil {
			return err
		}
		if q := caller(ctx); !q.MayOrg(controlplane.RightAdmin, p.Org) {
			return controlplane.Errorf(controlplane.Denied, "%s %q may not delete project %q: an administrator of its organization may", q.Kind, q.Name, p.Name)
		}
		for _, arch := range controlplane.Arches() {
			leases, err := tx.LiveLeases(ctx, controlplane.Scope{Project: p.ID, Arch: arch})
			if err != nil {
				return err
			}
			if len(leases) > 0 && !req.GetForce() {
				return controlplane.Errorf(controlplane.Precondition, "project %q has %d %s builds running: wait for them, or use --force", p.Name, len(leases), arch)
			}
		}
		return deleteProject(ctx, tx, p)
	})
	if err != nil {
		return nil, err
	}
	s.Log.InfoContext(ctx, "project deleted", "project", req.GetProject().GetName(), "principal", caller(ctx).ID)
	return &depotv1.DeleteProjectResponse{}, nil
}

func deleteProject(ctx context.Context, tx controlplane.Tx, p controlplane.Project) error {
	volumes, err := tx.Volumes(ctx, p.ID)
	if err != nil {
		return err
	}
	for _, v := range volumes {
		v.State = controlplane.VolumeTombstone
		if err := tx.PutVolume(ctx, v); err != nil {
			return err
		}
		tx.Announce(controlplane.TopicAgent, v.Agent)
	}
	tokens, err := tx.Tokens(ctx, p.ID)
	if err != nil {
		return err
	}
	for _, t := range tokens {
		if err := tx.DeleteToken(ctx, t.ID); err != nil {
			return err
		}
	}
	announceProject(tx, p)
	return tx.DeleteProject(ctx, p.ID)
}
