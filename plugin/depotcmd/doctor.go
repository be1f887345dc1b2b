package depotcmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/docker/buildx/builder"
	bxdriver "github.com/docker/buildx/driver"
	"github.com/docker/buildx/store"
	"github.com/docker/buildx/store/storeutil"
	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli-plugins/manager"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/driver"
	"github.com/spf13/cobra"
)

// The results of a check.
const (
	checkOK   = "ok"
	checkWarn = "warn"
	checkFail = "fail"
)

// clockTolerance is how far the clocks may be apart before it is worth saying.
const clockTolerance = time.Minute

// check is one link from the CLI to a running buildkitd.
type check struct {
	// Link names what was checked.
	Link string
	// Result is ok, warn or fail.
	Result string
	// Detail says what was found, Mend what to do about it.
	Detail string
	Mend   string `json:",omitempty"`
}

// doctor collects checks. A link that hangs on one that failed is not checked.
type doctor struct {
	*app
	launch  bool
	timeout time.Duration
	checks  []check
	show    func(check)
}

func (d *doctor) add(c check) bool {
	d.checks = append(d.checks, c)
	d.show(c)
	return c.Result != checkFail
}

func (d *doctor) ok(link, format string, args ...any) bool {
	return d.add(check{Link: link, Result: checkOK, Detail: fmt.Sprintf(format, args...)})
}

func (d *doctor) warn(link, mend, format string, args ...any) {
	d.add(check{Link: link, Result: checkWarn, Detail: fmt.Sprintf(format, args...), Mend: mend})
}

func (d *doctor) fail(link, mend, format string, args ...any) bool {
	return d.add(check{Link: link, Result: checkFail, Detail: fmt.Sprintf(format, args...), Mend: mend})
}

func (a *app) doctorCommand() *cobra.Command {
	var format string
	d := &doctor{app: a}
	cmd := &cobra.Command{
		Use:   "doctor [OPTIONS]",
		Short: "Check every link from the docker CLI to a running buildkitd",
		Long: "Check every link from the docker CLI to a running buildkitd, and say how to mend what is broken.\n" +
			"Exits with 1 if a check fails. A machine is started for each architecture, unless --launch=false.",
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch format {
			case "", "table":
				d.show = a.showCheck
			case "json":
				d.show = func(check) {}
			default:
				return usageError(cmd, fmt.Errorf("--format %q is not known: use table or json", format))
			}
			d.run(cmd.Context(), cmd.Root())
			if format == "json" {
				text, err := json.MarshalIndent(d.checks, "", "    ")
				if err != nil {
					return err
				}
				a.println(string(text))
			}
			for _, c := range d.checks {
				if c.Result == checkFail {
					return cli.StatusError{StatusCode: 1, Status: "depot cannot build here yet: see above"}
				}
			}
			return nil
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	flags := cmd.Flags()
	flags.BoolVar(&d.launch, "launch", true, "Start a machine for each architecture and ask its buildkitd")
	flags.DurationVar(&d.timeout, "timeout", 2*time.Minute, "How long to wait for a machine")
	flags.StringVar(&format, "format", "table", `Format output: "table" or "json"`)
	completeWith(cmd, "format", "table", "json")
	return cmd
}

func (a *app) showCheck(c check) {
	a.println(fmt.Sprintf("%-4s  %-14s  %s", c.Result, c.Link, c.Detail))
	if c.Mend != "" {
		a.println(fmt.Sprintf("      %-14s  -> %s", "", c.Mend))
	}
}

// mendConfigure is what mends most of the CLI's side.
const mendConfigure = "run `docker depot configure`"

func (d *doctor) run(ctx context.Context, root *cobra.Command) {
	d.checkPlugin("buildx", root)
	d.checkPlugin("depot", root)
	d.checkAlias()
	group := d.checkBuilder()
	endpoint, server := d.checkEndpoint(group)
	config, ok := d.checkLogin(server)
	if !ok {
		return
	}
	err := withConfig(config, func(c *client.Client) error {
		if d.checkServer(ctx, c, config) {
			d.checkProject(ctx, c, endpoint, group)
		}
		return nil
	})
	if err != nil {
		d.fail("server", "mend the URL or the token", "%v", err)
	}
	if group == nil || d.failed() {
		return
	}
	if !d.launch {
		d.warn("machine", "run it without --launch=false", "not checked")
		return
	}
	d.checkMachines(ctx, group)
}

func (d *doctor) failed() bool {
	for _, c := range d.checks {
		if c.Result == checkFail {
			return true
		}
	}
	return false
}

// checkPlugin asks the CLI's own code which file it takes for a plugin.
func (d *doctor) checkPlugin(name string, root *cobra.Command) {
	link := "docker-" + name
	p, err := manager.GetPlugin(name, d.cli, &cobra.Command{Use: root.Name()})
	switch {
	case err != nil:
		d.fail(link, mendConfigure, "the docker CLI finds no such plugin: %v", err)
	case p.Err != nil:
		d.fail(link, mendConfigure, "%s cannot be used: %v", p.Path, p.Err)
	case p.Vendor != Vendor:
		d.fail(link, mendConfigure, "the docker CLI takes %s, by %q, version %s", p.Path, p.Vendor, p.Version)
	case p.Version != d.deps.Version:
		d.warn(link, "run `docker depot configure` with the version that you want", "%s has version %s, this program has %s", p.Path, p.Version, d.deps.Version)
	default:
		d.ok(link, "%s, version %s", p.Path, p.Version)
	}
}

func (d *doctor) checkAlias() {
	config := d.cli.ConfigFile()
	if alias := config.Aliases["builder"]; alias != "buildx" {
		d.fail("alias", mendConfigure, "%s has no alias that leads `docker build` to buildx: it ignores the current builder", config.Filename)
		return
	}
	d.ok("alias", "`docker build` is `docker buildx build`")
}

// checkBuilder finds the builder that a build would use.
func (d *doctor) checkBuilder() *store.NodeGroup {
	group, from, err := d.chosenBuilder()
	mend := mendConfigure
	if from == builderVariable {
		mend = "unset BUILDX_BUILDER"
	}
	switch {
	case err != nil:
		d.fail("builder", mend, "%s: %v", from, err)
		return nil
	case group.Driver != driver.Name:
		name := group.Driver
		if name == "" {
			name = "docker"
		}
		d.fail("builder", mend, "%s is %q with the driver %q", from, group.Name, name)
		return nil
	case from != currentBuilder:
		d.warn("builder", "unset BUILDX_BUILDER if that is not what you want", "%s chooses %q, whatever the current builder is", from, group.Name)
	default:
		d.ok("builder", "%s is %q", from, group.Name)
	}
	return group
}

// How messages name what chooses a builder: `docker buildx use`, or the
// environment.
const (
	currentBuilder  = "the current builder"
	builderVariable = "BUILDX_BUILDER"
)

func (d *doctor) chosenBuilder() (*store.NodeGroup, string, error) {
	txn, release, err := storeutil.GetStore(d.cli)
	if err != nil {
		return nil, "buildx's store", err
	}
	defer release()
	if name := d.deps.Source.Env(builderVariable); name != "" {
		group, err := storeutil.GetNodeGroup(txn, d.cli, name)
		return group, builderVariable, err
	}
	group, err := storeutil.GetCurrentInstance(txn, d.cli)
	return group, currentBuilder, err
}

// checkEndpoint says where the builder leads to; without a builder, where the
// environment or the login leads to.
func (d *doctor) checkEndpoint(group *store.NodeGroup) (driver.Endpoint, string) {
	if group != nil && len(group.Nodes) > 0 {
		endpoint, err := driver.ParseEndpoint(group.Nodes[0].Endpoint)
		if err == nil {
			endpoint.Arch = ""
			return endpoint, endpoint.Server()
		}
		d.fail("builder", mendConfigure, "%v", err)
	}
	server, err := d.deps.Source.Server()
	if err != nil {
		d.fail("login", "run `docker depot login`, or `docker depot up` for a server on this host", "%v", err)
	}
	return driver.Endpoint{}, server
}

func (d *doctor) checkLogin(server string) (client.Config, bool) {
	if server == "" {
		return client.Config{}, false
	}
	config, err := d.deps.Source.Config(server)
	if err != nil {
		return config, d.fail("login", "run `docker depot login "+server+"`", "%v", err)
	}
	config.UserAgent = d.userAgent()
	return config, d.ok("login", "token for %s from %s", server, d.tokenFrom(server))
}

func (d *doctor) checkServer(ctx context.Context, c *client.Client, config client.Config) bool {
	who, err := c.Admin.WhoAmI(ctx, &depotv1.WhoAmIRequest{})
	if err != nil {
		return d.fail("server", mendServer(err, config.URL), "%v", err)
	}
	trust := "certificate by its authority"
	if config.Token.Pin() != "" {
		trust = "certificate by the token's pin"
	}
	d.ok("server", "%s, version %s, %s; you are %s", config.URL, who.GetServerVersion(), trust, describe(who))
	if apart := time.Since(who.GetServerTime().AsTime()); who.GetServerTime() != nil && apart.Abs() > clockTolerance {
		d.warn("clock", "set this host's clock", "the clocks of this host and the server are %s apart", apart.Round(time.Second))
	}
	return true
}

// mendServer says what to do about a server that gave no answer, or that
// refused the token.
func mendServer(err error, url string) string {
	switch {
	case client.Temporary(err):
		return "start the server, with `docker depot up` if it is one of this host, or mend the URL and the way there"
	case connect.CodeOf(err) == connect.CodeUnauthenticated, connect.CodeOf(err) == connect.CodePermissionDenied:
		return "run `docker depot login " + url + "` with a token that is good"
	default:
		return "mend the URL, or run `docker depot login` with a token of this server"
	}
}

func (d *doctor) checkProject(ctx context.Context, c *client.Client, endpoint driver.Endpoint, group *store.NodeGroup) {
	if group == nil {
		return
	}
	b, err := c.Builder.GetBuilder(ctx, &depotv1.GetBuilderRequest{Project: &depotv1.ProjectRef{
		Organization: endpoint.Organization, Name: endpoint.Project,
	}})
	if err != nil {
		d.fail("project", "choose another with `docker depot configure --project`", "%v", err)
		return
	}
	served := make([]string, 0, len(b.GetArchitectures()))
	for _, arch := range b.GetArchitectures() {
		served = append(served, archName(arch.GetName(), arch.GetEmulated()))
	}
	switch {
	case len(served) == 0:
		d.fail("project", "start an agent: `docker depot up`, or see `docker depot agent token --help`", "%s has no pool to build in", endpoint.Name())
	case len(served) != len(group.Nodes):
		d.warn("project", mendConfigure, "%s builds for %s, but builder %q has %d nodes", endpoint.Name(), strings.Join(served, ", "), group.Name, len(group.Nodes))
	default:
		d.ok("project", "%s builds for %s", endpoint.Name(), strings.Join(served, ", "))
	}
	d.checkPools(ctx, c)
}

// checkPools looks at the pools, if the caller may see them. A pool that takes
// no machines is worth a warning as long as another one of its architecture
// does; without one, builds wait for as long as it lasts.
func (d *doctor) checkPools(ctx context.Context, c *client.Client) {
	resp, err := c.Admin.ListPools(ctx, &depotv1.ListPoolsRequest{})
	if err != nil {
		d.warn("pools", "ask an administrator if builds wait", "not visible to you: %v", err)
		return
	}
	open := map[string]bool{}
	for _, p := range resp.GetPools() {
		if p.GetConnected() && p.GetPool().GetClosed() == "" {
			open[p.GetPool().GetArch()] = true
		}
	}
	for _, p := range resp.GetPools() {
		name, arch := p.GetAgent()+"/"+p.GetPool().GetName(), p.GetPool().GetArch()
		c := check{Link: "pool", Result: checkWarn}
		if !open[arch] {
			c.Result = checkFail
		}
		switch {
		case !p.GetConnected():
			c.Detail = name + ": its agent is not connected"
			c.Mend = "start the agent on that host, with `docker depot up` if that started it, or remove it with `docker depot agent rm`"
		case p.GetPool().GetClosed() != "":
			c.Detail = name + " takes no machines: " + p.GetPool().GetClosed()
			c.Mend = "mend what the reason names"
		default:
			c.Result = checkOK
			c.Detail = fmt.Sprintf("%s: %s, %d of %d machines", name, archName(arch, p.GetPool().GetEmulated()), p.GetMachines(), p.GetPool().GetMaxMachines())
		}
		d.add(c)
	}
}

// checkMachines does what a build does until its first step: it gets a machine
// for each architecture and asks buildkitd for its workers.
func (d *doctor) checkMachines(parent context.Context, group *store.NodeGroup) {
	ctx, cancel := context.WithTimeoutCause(parent, d.timeout, fmt.Errorf("no machine within %s", d.timeout))
	defer cancel()
	b, err := builder.New(d.cli, builder.WithName(group.Name))
	if err != nil {
		d.fail("machine", mendConfigure, "%v", err)
		return
	}
	nodes, err := b.LoadNodes(ctx)
	if err != nil {
		d.fail("machine", mendConfigure, "%v", err)
		return
	}
	for _, node := range nodes {
		started := time.Now()
		version, err := ask(ctx, node)
		if err != nil && ctx.Err() != nil {
			err = errors.Join(err, context.Cause(ctx))
		}
		if err != nil {
			d.fail("machine", "see `docker depot machine ls --all` and the agent's log", "%s: %v", node.Name, err)
			continue
		}
		d.ok("machine", "%s: buildkitd %s answered after %s", node.Name, version, time.Since(started).Round(time.Millisecond))
	}
}

// ask boots a node and returns its buildkitd's version.
func ask(ctx context.Context, node builder.Node) (string, error) {
	if node.Err != nil {
		return "", node.Err
	}
	c, err := bxdriver.Boot(ctx, ctx, node.Driver, nil)
	if err != nil {
		return "", err
	}
	workers, err := c.ListWorkers(ctx)
	switch {
	case err != nil:
		return "", fmt.Errorf("ask buildkitd for its workers: %w", err)
	case len(workers) == 0:
		return "", errors.New("buildkitd has no worker")
	}
	return workers[0].BuildkitVersion.Version, nil
}
