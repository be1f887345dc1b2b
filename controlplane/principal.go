package controlplane

import (
	"slices"
	"time"
)

// Role is what a principal may do in its organization or project.
type Role string

// The roles, least first.
const (
	RoleViewer  Role = "viewer"
	RoleBuilder Role = "builder"
	RoleAdmin   Role = "admin"
)

// Right is what a call needs.
type Right string

// The rights.
const (
	RightView  Right = "view"  // see a project and what belongs to it
	RightBuild Right = "build" // lease machines of a project
	RightAdmin Right = "admin" // change a project, its tokens and machines
	// RightOperate is for the server itself: organizations, agents, pools.
	RightOperate Right = "operate"
	// RightMachine and RightAgent are those of the two kinds of agent.
	RightMachine Right = "machine"
	RightAgent   Right = "agent"
	// RightNone is needed by calls that check their caller themselves: those
	// that trade a one-time token for a certificate.
	RightNone Right = "none"
	// RightKnown is needed by calls that any authenticated principal may make.
	RightKnown Right = "known"
)

// TokenKind is what a token is for; it stands in the token's text.
type TokenKind string

// The kinds of token.
const (
	TokenUser    TokenKind = "user"    // a person, in one organization or the whole server
	TokenProject TokenKind = "project" // a project's builds, in CI
	TokenAgent   TokenKind = "agent"   // joins one cloud agent, once
)

// Token is a stored token. Its secret is known only by its hash.
type Token struct {
	ID   string
	Kind TokenKind
	Name string
	// Org is empty for the server's administrator and for agents; Project is
	// set for project tokens.
	Org     string
	Project string
	Role    Role
	// Hash is the SHA-256 of the secret: 32 random bytes need no slow hash.
	Hash    []byte
	Created time.Time
	Expires time.Time // zero: never
	Used    time.Time
	// UsedKey is, for an agent token, the SHA-256 of the key it was bound to.
	UsedKey []byte
}

// Expired reports whether the token is no longer good at now.
func (t Token) Expired(now time.Time) bool { return !t.Expires.IsZero() && !now.Before(t.Expires) }

// PrincipalKind says who calls.
type PrincipalKind string

// The kinds of principal.
const (
	PrincipalUser    PrincipalKind = "user"
	PrincipalProject PrincipalKind = "project"
	PrincipalMachine PrincipalKind = "machine"
	PrincipalAgent   PrincipalKind = "agent"
)

// Principal is an authenticated caller.
type Principal struct {
	Kind PrincipalKind
	// ID is the token's, machine's or agent's id.
	ID   string
	Name string
	// Org is the organization's id; empty for the server's administrator,
	// machines and agents.
	Org string
	// Project is set for principals that are bound to one project.
	Project string
	Role    Role
	// Isolated principals may only run isolated builds.
	Isolated bool
	Expires  time.Time
}

// Operator reports whether p administers the whole server.
func (p Principal) Operator() bool {
	return p.Kind == PrincipalUser && p.Org == "" && p.Role == RoleAdmin
}

// grants lists what each role may do in the projects that it reaches.
func grants(r Role) []Right {
	switch r {
	case RoleAdmin:
		return []Right{RightView, RightBuild, RightAdmin}
	case RoleBuilder:
		return []Right{RightView, RightBuild}
	case RoleViewer:
		return []Right{RightView}
	}
	return nil
}

// May reports whether p has right on project. It is the one place that
// decides; whatever asks for a project's data or machines goes through it.
func (p Principal) May(right Right, project Project) bool {
	switch p.Kind {
	case PrincipalUser:
		return (p.Operator() || p.Org != "" && p.Org == project.Org) && slices.Contains(grants(p.Role), right)
	case PrincipalProject:
		return p.Project != "" && p.Project == project.ID && slices.Contains(grants(p.Role), right)
	case PrincipalMachine, PrincipalAgent:
		return false
	}
	return false
}

// MayOrg reports whether p has right on all of the organization.
func (p Principal) MayOrg(right Right, org string) bool {
	return p.Kind == PrincipalUser && (p.Operator() || p.Org != "" && p.Org == org) &&
		slices.Contains(grants(p.Role), right)
}

// Has reports whether p has a right that does not depend on a project.
func (p Principal) Has(right Right) bool {
	switch right {
	case RightOperate:
		return p.Operator()
	case RightMachine:
		return p.Kind == PrincipalMachine
	case RightAgent:
		return p.Kind == PrincipalAgent
	case RightKnown, RightNone:
		return true
	case RightView, RightBuild, RightAdmin:
		// Those need a project; a principal that could have none of them
		// anywhere is refused at the door.
		return slices.Contains(grants(p.Role), right) && p.Kind != PrincipalMachine && p.Kind != PrincipalAgent
	}
	return false
}
