package server

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// adminService answers `docker depot`. Its methods stand in one file per noun.
type adminService struct{ s *Server }

// WhoAmI describes the caller and the server.
func (a *adminService) WhoAmI(ctx context.Context, _ *depotv1.WhoAmIRequest) (*depotv1.WhoAmIResponse, error) {
	p := caller(ctx)
	resp := &depotv1.WhoAmIResponse{
		PrincipalId: p.ID, Kind: string(p.Kind), Name: p.Name, Role: string(p.Role), Expires: stamp(p.Expires),
		ServerId: a.s.Record.ID, ServerVersion: a.s.Version, ServerTime: stamp(a.s.Now()),
	}
	err := a.s.Store.View(ctx, func(tx controlplane.Tx) (err error) {
		resp.Organization, resp.Project, err = names(ctx, tx, p.Org, p.Project)
		return err
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// names returns the names of an organization and a project; empty ids have
// empty names, and so has what was deleted.
func names(ctx context.Context, tx controlplane.Tx, orgID, projectID string) (org, project string, err error) {
	if orgID != "" {
		o, err := tx.Organization(ctx, orgID)
		if err != nil && controlplane.CodeOf(err) != controlplane.NotFound {
			return "", "", err
		}
		org = o.Name
	}
	if projectID != "" {
		p, err := tx.Project(ctx, projectID)
		if err != nil && controlplane.CodeOf(err) != controlplane.NotFound {
			return "", "", err
		}
		project = p.Name
	}
	return org, project, nil
}

// CreateToken makes a token. Nobody can give more than they have.
func (a *adminService) CreateToken(ctx context.Context, req *depotv1.CreateTokenRequest) (*depotv1.CreateTokenResponse, error) {
	s := a.s
	now := s.Now()
	token := controlplane.Token{
		Kind: controlplane.TokenKind(req.GetKind()), Name: req.GetName(),
		Role: cmp.Or(controlplane.Role(req.GetRole()), controlplane.RoleBuilder),
	}
	if len(token.Name) > 100 {
		return nil, controlplane.Errorf(controlplane.Invalid, "token name of %d bytes is too long: use at most 100", len(token.Name))
	}
	if d := req.GetLifetime(); d != nil {
		if d.AsDuration() <= 0 || d.AsDuration() > maxTokenLifetime {
			return nil, controlplane.Errorf(controlplane.Invalid, "token lifetime %s is out of range: use more than 0s and at most %s, or none for a token that does not expire", d.AsDuration(), maxTokenLifetime)
		}
		token.Expires = now.Add(d.AsDuration())
	}
	var text string
	err := s.Store.Update(ctx, func(tx controlplane.Tx) (err error) {
		if err := stillKnown(ctx, tx); err != nil {
			return err
		}
		t := token
		if t, err = s.grant(ctx, tx, t, req.GetProject()); err != nil {
			return err
		}
		if t, text, err = s.Authenticator.NewToken(t, now); err != nil {
			return err
		}
		token = t
		return tx.PutToken(ctx, t)
	})
	if err != nil {
		return nil, err
	}
	s.Log.InfoContext(ctx, "token created", "token", token.ID, "kind", string(token.Kind), "role", string(token.Role), "principal", caller(ctx).ID)
	wire, err := s.wireToken(ctx, token)
	if err != nil {
		return nil, err
	}
	return &depotv1.CreateTokenResponse{Token: wire, Secret: text}, nil
}

// maxTokenLifetime bounds what is asked for: a hundred years. The store cannot
// hold times after 2261.
const maxTokenLifetime = 100 * 365 * 24 * time.Hour

// agentTokenLifetime is how long an agent token is good for joining.
const agentTokenLifetime = time.Hour

// grant completes a token's reach, if the caller may give it.
func (s *Server) grant(ctx context.Context, tx controlplane.Tx, t controlplane.Token, ref *depotv1.ProjectRef) (controlplane.Token, error) {
	p := caller(ctx)
	if !slices.Contains([]controlplane.Role{controlplane.RoleViewer, controlplane.RoleBuilder, controlplane.RoleAdmin}, t.Role) {
		return t, controlplane.Errorf(controlplane.Invalid, "role %q is not known: use viewer, builder or admin", t.Role)
	}
	switch t.Kind {
	case controlplane.TokenAgent:
		if !p.Operator() {
			return t, controlplane.Errorf(controlplane.Denied, "only the server's administrator makes agent tokens")
		}
		if t.Expires.IsZero() {
			t.Expires = s.Now().Add(agentTokenLifetime)
		}
	case controlplane.TokenProject:
		project, err := s.project(ctx, tx, ref, controlplane.RightAdmin)
		if err != nil {
			return t, err
		}
		t.Project, t.Org = project.ID, project.Org
	case controlplane.TokenUser:
		org, err := s.organization(ctx, tx, ref.GetOrganization())
		if err != nil {
			return t, err
		}
		if !p.MayOrg(controlplane.RightAdmin, org.ID) {
			return t, controlplane.Errorf(controlplane.Denied, "%s %q may not make tokens for organization %q", p.Kind, p.Name, org.Name)
		}
		t.Org = org.ID
	default:
		return t, controlplane.Errorf(controlplane.Invalid, "token kind %q is not known: use user, project or agent", t.Kind)
	}
	return t, nil
}

func (s *Server) wireToken(ctx context.Context, t controlplane.Token) (*depotv1.Token, error) {
	out := &depotv1.Token{
		Id: t.ID, Kind: string(t.Kind), Name: t.Name, Role: string(t.Role),
		Created: stamp(t.Created), Expires: stamp(t.Expires), LastUsed: stamp(t.Used),
	}
	err := s.Store.View(ctx, func(tx controlplane.Tx) (err error) {
		out.Organization, out.Project, err = names(ctx, tx, t.Org, t.Project)
		return err
	})
	return out, err
}

// mayToken reports whether the caller administers what the token reaches.
func mayToken(p controlplane.Principal, t controlplane.Token) bool {
	switch {
	case p.Operator():
		return true
	case t.Org == "":
		return false
	case p.Kind == controlplane.PrincipalProject:
		return p.Role == controlplane.RoleAdmin && t.Project != "" && t.Project == p.Project
	}
	return p.MayOrg(controlplane.RightAdmin, t.Org)
}

// ListTokens lists the tokens that the caller administers.
func (a *adminService) ListTokens(ctx context.Context, req *depotv1.ListTokensRequest) (*depotv1.ListTokensResponse, error) {
	var tokens []controlplane.Token
	err := a.s.Store.View(ctx, func(tx controlplane.Tx) error {
		project := ""
		if req.GetProject() != nil {
			p, err := a.s.project(ctx, tx, req.GetProject(), controlplane.RightAdmin)
			if err != nil {
				return err
			}
			project = p.ID
		}
		var err error
		tokens, err = tx.Tokens(ctx, project)
		return err
	})
	if err != nil {
		return nil, err
	}
	resp := &depotv1.ListTokensResponse{}
	for _, t := range tokens {
		if !mayToken(caller(ctx), t) {
			continue
		}
		wire, err := a.s.wireToken(ctx, t)
		if err != nil {
			return nil, err
		}
		resp.Tokens = append(resp.Tokens, wire)
	}
	return resp, nil
}

// DeleteToken revokes a token and ends the leases that it holds.
func (a *adminService) DeleteToken(ctx context.Context, req *depotv1.DeleteTokenRequest) (*depotv1.DeleteTokenResponse, error) {
	s := a.s
	err := s.Store.Update(ctx, func(tx controlplane.Tx) error {
		t, err := tx.Token(ctx, req.GetId())
		if controlplane.CodeOf(err) == controlplane.NotFound || err == nil && !mayToken(caller(ctx), t) {
			return controlplane.Errorf(controlplane.NotFound, "token %q does not exist: see `docker depot token ls`", req.GetId())
		}
		if err != nil {
			return err
		}
		leases, err := tx.PrincipalLeases(ctx, t.ID)
		if err != nil {
			return err
		}
		for _, l := range leases {
			if err := s.endLease(ctx, tx, l, controlplane.EndRevoked, "its token was revoked"); err != nil {
				return err
			}
		}
		return tx.DeleteToken(ctx, t.ID)
	})
	if err != nil {
		return nil, err
	}
	s.Log.InfoContext(ctx, "token deleted", "token", req.GetId(), "principal", caller(ctx).ID)
	return &depotv1.DeleteTokenResponse{}, nil
}
