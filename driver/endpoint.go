package driver

import (
	"fmt"
	"net/url"
	"strings"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
)

// scheme is that of every endpoint.
const scheme = "depot"

// Endpoint names a project on a server, and one of its architectures for a
// node: depot://host[:port]/organization/project[/arch].
type Endpoint struct {
	// Host is the server's host[:port].
	Host string
	// Organization and Project are names. Both are empty in a default endpoint
	// for the project that the caller's token is for.
	Organization, Project string
	// Arch is empty but for a node's endpoint.
	Arch string
}

// ParseEndpoint reads an endpoint.
func ParseEndpoint(text string) (Endpoint, error) {
	bad := func(what string) (Endpoint, error) {
		return Endpoint{}, fmt.Errorf("endpoint %q is not valid, %s: use depot://host[:port]/organization/project", text, what)
	}
	u, err := url.Parse(text)
	switch {
	case err != nil:
		return bad("it is no URL")
	case u.Scheme != scheme:
		return bad("it does not begin with depot://")
	case u.Hostname() == "":
		return bad("it has no host")
	case u.User != nil:
		return Endpoint{}, fmt.Errorf("an endpoint must not carry credentials: use `docker depot login https://%s` or DEPOT_TOKEN", u.Host)
	case u.RawQuery != "", u.Fragment != "":
		return bad("it has more than a path")
	}
	parts := strings.Split(strings.Trim(u.Path, "/"), "/")
	if len(parts) < 2 || len(parts) > 3 || parts[0] == "" || parts[1] == "" {
		return bad("it does not name one project")
	}
	e := Endpoint{Host: strings.ToLower(u.Host), Organization: parts[0], Project: parts[1]}
	if len(parts) == 3 {
		if e.Arch = parts[2]; platformsOf(e.Arch) == nil {
			return bad("its architecture is neither amd64 nor arm64")
		}
	}
	return e, nil
}

// String returns the endpoint as [ParseEndpoint] reads it.
func (e Endpoint) String() string {
	s := scheme + "://" + e.Host + "/" + e.Organization + "/" + e.Project
	if e.Arch != "" {
		s += "/" + e.Arch
	}
	return s
}

// Server returns the server's URL.
func (e Endpoint) Server() string { return "https://" + e.Host }

// Name returns the project's full name.
func (e Endpoint) Name() string { return e.Organization + "/" + e.Project }

func (e Endpoint) ref() *depotv1.ProjectRef {
	return &depotv1.ProjectRef{Organization: e.Organization, Name: e.Project}
}

// projectRef reads how people name a project: its id, organization/project, a
// plain name in their only organization, or nothing for their token's.
func projectRef(text string) (*depotv1.ProjectRef, error) {
	switch parts := strings.Split(text, "/"); {
	case strings.HasPrefix(text, "prj_"):
		return &depotv1.ProjectRef{Id: text}, nil
	case len(parts) == 1:
		return &depotv1.ProjectRef{Name: text}, nil
	case len(parts) == 2 && parts[0] != "" && parts[1] != "":
		return &depotv1.ProjectRef{Organization: parts[0], Name: parts[1]}, nil
	default:
		return nil, fmt.Errorf("project %q is not valid: use its id, or organization/project", text)
	}
}

// hostOf returns the host of a server's URL as an endpoint has it.
func hostOf(server string) (string, error) {
	u, err := client.ParseURL(server)
	if err != nil {
		return "", err
	}
	if u.Path != "" {
		return "", fmt.Errorf("server %s has a path, which a builder's endpoint cannot carry: give it a host or port of its own", server)
	}
	return u.Host, nil
}
