package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	bx "github.com/docker/buildx/driver"
	dockerclient "github.com/moby/moby/client"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/driver/credentials"
)

// Name is the driver's, as in `docker buildx create --driver depot`.
const Name = "depot"

// priority keeps buildx from choosing this driver where none was named.
const priority = 95

// Options are what the driver takes from its process.
type Options struct {
	// Credentials says which server and as whom.
	Credentials credentials.Source
	// UserAgent names the program and its version, for the server's log.
	UserAgent string
	// Stderr takes warnings, and why a command without a progress display
	// waits.
	Stderr io.Writer
}

// Factory makes drivers, and owns the leases of the process.
type Factory struct {
	opts      Options
	leases    table
	warnFiles sync.Once

	mu       sync.Mutex
	sessions map[sessionKey]*session // guarded by mu
}

type sessionKey struct{ server, token string }

// session is a server as one principal sees it.
type session struct {
	*client.Client
	principal string // the token's id
}

var _ interface {
	bx.Factory
	bx.DefaultBuilderNamer
	bx.NodeResolver
} = (*Factory)(nil)

// Register makes the driver known to buildx, for this process.
func Register(opts Options) *Factory {
	f := &Factory{opts: opts, sessions: map[sessionKey]*session{}}
	bx.Register(f)
	return f
}

// Name returns "depot".
func (*Factory) Name() string { return Name }

// Usage returns "depot".
func (*Factory) Usage() string { return Name }

// AllowsInstances says that builders of this driver can be created.
func (*Factory) AllowsInstances() bool { return true }

// Priority is low: the driver is used where it is named.
func (*Factory) Priority(context.Context, string, dockerclient.APIClient, map[string][]string) int {
	return priority
}

// DefaultBuilderName returns the name of a builder that is created without
// --name: depot-<organization>-<project>.
func (*Factory) DefaultBuilderName(_ context.Context, endpoint string) (string, error) {
	e, err := ParseEndpoint(endpoint)
	if err != nil {
		return "", err
	}
	return strings.Join([]string{Name, e.Organization, e.Project}, "-"), nil
}

// New returns the driver of one node. It does not connect, and it does not
// look for credentials: buildx also makes drivers only to list them.
func (f *Factory) New(_ context.Context, cfg bx.InitConfig) (bx.Driver, error) { //nolint:ireturn // buildx's interface
	endpoint, err := ParseEndpoint(cfg.EndpointAddr)
	if err != nil {
		return nil, err
	}
	if endpoint.Arch == "" {
		return nil, fmt.Errorf("endpoint %s names no architecture: create the builder anew with `docker buildx create --driver depot %s`", endpoint, endpoint)
	}
	if len(cfg.BuildkitdFlags) > 0 {
		return nil, errors.New("--buildkitd-flags cannot be used with the depot driver: buildkitd runs on machines that the project's settings configure, see `docker depot project update --help`")
	}
	if len(cfg.Files) > 0 {
		f.warnFiles.Do(func() {
			fmt.Fprintln(f.opts.Stderr, "WARNING: the depot driver does not use your buildkitd.toml: the project's settings configure its machines") //nolint:errcheck // a warning that nobody can read is lost
		})
	}
	opts, err := parseDriverOpts(cfg.DriverOpts)
	if err != nil {
		return nil, err
	}
	return &Driver{factory: f, cfg: cfg, endpoint: endpoint, opts: opts}, nil
}

// ResolveNodes makes a node for each architecture that the project has a pool
// for. An empty endpoint means the default one.
func (f *Factory) ResolveNodes(ctx context.Context, node bx.Node) ([]bx.Node, error) {
	if _, err := parseDriverOpts(node.DriverOpts); err != nil {
		return nil, err
	}
	if node.Endpoint == "" {
		endpoint, err := f.DefaultEndpoint(ctx)
		if err != nil {
			return nil, err
		}
		node.Endpoint = endpoint
	}
	endpoint, err := ParseEndpoint(node.Endpoint)
	if err != nil {
		return nil, err
	}
	only := endpoint.Arch
	endpoint.Arch = ""
	c, err := f.session(endpoint.Server())
	if err != nil {
		return nil, err
	}
	builder, err := c.Builder.GetBuilder(ctx, &depotv1.GetBuilderRequest{Project: endpoint.ref()})
	if err != nil {
		return nil, err
	}
	nodes, err := nodesOf(builder, endpoint, node, only)
	if err == nil && len(nodes) == 0 {
		return nil, fmt.Errorf("project %s has no pool that builds %s: start an agent with one, see `docker depot pool ls`",
			endpoint.Name(), wantedPlatforms(node.Platforms, only))
	}
	return nodes, err
}

// nodesOf lays out a builder's nodes, the client's own architecture first.
func nodesOf(builder *depotv1.GetBuilderResponse, endpoint Endpoint, node bx.Node, only string) ([]bx.Node, error) {
	emulated := map[string]bool{}
	var archs []string
	for _, a := range builder.GetArchitectures() {
		if platformsOf(a.GetName()) == nil || only != "" && a.GetName() != only {
			continue
		}
		archs = append(archs, a.GetName())
		emulated[a.GetName()] = a.GetEmulated()
	}
	clientFirst(archs)
	var (
		nodes []bx.Node
		built []string
	)
	for _, arch := range archs {
		ps, err := share(arch, node.Platforms)
		if err != nil {
			return nil, err
		}
		if len(ps) == 0 {
			continue
		}
		built = append(built, ps...)
		endpoint.Arch = arch
		nodes = append(nodes, bx.Node{
			Name:        nodeName(node.Name, endpoint, emulated[arch]),
			Endpoint:    endpoint.String(),
			EndpointSet: true,
			Platforms:   ps,
			DriverOpts:  node.DriverOpts,
		})
	}
	if len(nodes) == 1 && node.Name != "" {
		nodes[0].Name = node.Name
	}
	if len(node.Platforms) > 0 && len(built) < len(node.Platforms) && len(nodes) > 0 {
		return nil, fmt.Errorf("project %s builds only %s of %s: leave the rest out, or start an agent with a pool for it",
			endpoint.Name(), strings.Join(built, ", "), strings.Join(node.Platforms, ", "))
	}
	return nodes, nil
}

// nodeName begins with a letter, which buildx demands, and says "emulated", so
// that no listing lets an emulated node pass for a native one.
func nodeName(given string, e Endpoint, emulated bool) string {
	parts := []string{e.Arch, e.Project}
	if given != "" {
		parts = []string{given, e.Arch}
	}
	if emulated {
		parts = append(parts, "emulated")
	}
	return strings.Join(parts, "-")
}

func wantedPlatforms(platforms []string, arch string) string {
	switch {
	case arch != "":
		return arch
	case len(platforms) > 0:
		return strings.Join(platforms, ", ")
	default:
		return "amd64 or arm64"
	}
}

// DefaultEndpoint returns the endpoint to use where none is named, without an
// architecture: the server and project that the environment, the nearest
// depot.json or the stored login say, in this order. It asks the server for
// the project's full name.
func (f *Factory) DefaultEndpoint(ctx context.Context) (string, error) {
	server, err := f.opts.Credentials.Server()
	if err != nil {
		return "", err
	}
	host, err := hostOf(server)
	if err != nil {
		return "", err
	}
	project, err := f.opts.Credentials.Project(server)
	if err != nil {
		return "", err
	}
	ref, err := projectRef(project)
	if err != nil {
		return "", err
	}
	c, err := f.session(server)
	if err != nil {
		return "", err
	}
	builder, err := c.Builder.GetBuilder(ctx, &depotv1.GetBuilderRequest{Project: ref})
	if err != nil {
		return "", err
	}
	e, err := ParseEndpoint(scheme + "://" + host + "/" + builder.GetProject())
	return e.String(), err
}

// session returns the client for a server as the caller; all drivers of the
// process share it and its connection.
func (f *Factory) session(server string) (*session, error) {
	cfg, err := f.opts.Credentials.Config(server)
	if err != nil {
		return nil, err
	}
	cfg.UserAgent = f.opts.UserAgent
	key := sessionKey{server, cfg.Token.Secret()}
	f.mu.Lock()
	defer f.mu.Unlock()
	if s, ok := f.sessions[key]; ok {
		return s, nil
	}
	c, err := client.New(cfg)
	if err != nil {
		return nil, err
	}
	s := &session{Client: c, principal: cfg.Token.ID()}
	f.sessions[key] = s
	return s, nil
}

// ReleaseAll gives back all leases of the process and waits until that is
// done, or ctx is. main calls it after the last command and before it exits; a
// machine that is not released is given back by the server a little later.
func (f *Factory) ReleaseAll(ctx context.Context) {
	f.leases.releaseAll(ctx)
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.sessions {
		c.Close()
	}
}
