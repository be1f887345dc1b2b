package depotcmd

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/driver"
	"github.com/opendepot/depot/driver/credentials"
	"github.com/opendepot/depot/plugin/configure"
	"github.com/spf13/cobra"
)

// defaultBuilder is the builder's name where none is given.
const defaultBuilder = "depot"

type configureFlags struct {
	project, builder       string
	defaultLoad, uninstall bool
}

func (a *app) configureCommand() *cobra.Command {
	var f configureFlags
	cmd := &cobra.Command{
		Use:   "configure [OPTIONS]",
		Short: "Make docker build, buildx and compose build on depot",
		Long: "Make `docker build`, `docker buildx` and `docker compose build` of this user build on depot: install this program as\n" +
			"the plugins docker-buildx and docker-depot, make a builder and make it the current one, and set the alias that\n" +
			"leads `docker build` to it. Run it again to bring the builder up to date, after a pool was added for example.\n" +
			"--uninstall puts back what was there, byte for byte.",
		Example: "  docker depot configure --project acme/web\n  docker depot configure --uninstall",
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.uninstall {
				if f.project != "" || f.defaultLoad || cmd.Flags().Changed("builder") {
					return usageError(cmd, errors.New("--uninstall goes with no other option"))
				}
				return a.unconfigure(cmd.Context())
			}
			return a.configure(cmd.Context(), f)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	flags := cmd.Flags()
	flags.StringVar(&f.project, "project", "", "The project to build in (default: $DEPOT_PROJECT_ID, depot.json, the login's, or the only one)")
	flags.StringVar(&f.builder, "builder", defaultBuilder, "The builder's name")
	flags.BoolVar(&f.defaultLoad, "default-load", false, "Load images into the local engine when a build names no output")
	flags.BoolVar(&f.uninstall, "uninstall", false, "Put back what was there before")
	a.completeProjectFlag(cmd)
	return cmd
}

func (a *app) configure(ctx context.Context, f configureFlags) error {
	endpoint, err := a.endpoint(ctx, f.project)
	if err != nil {
		return err
	}
	executable, err := a.executable()
	if err != nil {
		return err
	}
	options := configure.Options{Executable: executable, Builder: f.builder, Endpoint: endpoint.String()}
	if f.defaultLoad {
		options.DriverOpts = map[string]string{"default-load": "true"}
	}
	// The project becomes the login's default too, for `docker buildx create`.
	// Without a stored login the token is in the environment.
	before, err := a.deps.Source.Store.Project(endpoint.Server())
	switch {
	case err == nil:
		options.Login = &configure.LoginProject{Server: endpoint.Server(), Before: before, After: endpoint.Name()}
	case !errors.Is(err, credentials.ErrNotFound):
		return err
	}
	report, err := configure.Install(ctx, a.cli, options)
	if err != nil {
		return err
	}
	if l := options.Login; l != nil {
		if err := a.deps.Source.Store.SetProject(l.Server, l.After); err != nil {
			return err
		}
	}
	a.show(report)
	if name := a.deps.Source.Env("BUILDX_BUILDER"); name != "" && name != f.builder {
		a.notef("Note: BUILDX_BUILDER=%s is set and goes before the current builder: unset it.", name)
	}
	a.notef("Try it: docker build . (docker depot doctor checks every link)")
	return nil
}

func (a *app) unconfigure(ctx context.Context) error {
	report, err := configure.Uninstall(ctx, a.cli)
	if errors.Is(err, configure.ErrNotInstalled) {
		a.println("This docker CLI is not configured for depot: nothing to undo.")
		return nil
	}
	a.show(report)
	if err != nil || report.Login == nil {
		return err
	}
	return a.restoreProject(*report.Login)
}

// restoreProject puts the login's project back, unless the user has chosen
// another one, or logged out, since.
func (a *app) restoreProject(l configure.LoginProject) error {
	now, err := a.deps.Source.Store.Project(l.Server)
	if errors.Is(err, credentials.ErrNotFound) || err == nil && now != l.After {
		return nil
	}
	if err != nil {
		return err
	}
	return a.deps.Source.Store.SetProject(l.Server, l.Before)
}

func (a *app) show(report configure.Report) {
	for _, line := range report.Done {
		a.println(line)
	}
	for _, line := range report.Notes {
		a.notef("Note: %s.", line)
	}
}

// endpoint finds the project to build in and checks that it can be built in.
func (a *app) endpoint(ctx context.Context, project string) (driver.Endpoint, error) {
	acc, err := a.access()
	if err != nil {
		return driver.Endpoint{}, err
	}
	server, err := url.Parse(acc.config.URL)
	if err != nil {
		return driver.Endpoint{}, err
	}
	if project == "" {
		if project, err = a.deps.Source.Project(acc.config.URL); err != nil {
			return driver.Endpoint{}, err
		}
	}
	var endpoint driver.Endpoint
	err = withConfig(acc.config, func(c *client.Client) error {
		ref, err := chooseProject(ctx, c, project)
		if err != nil {
			return err
		}
		b, err := c.Builder.GetBuilder(ctx, &depotv1.GetBuilderRequest{Project: ref})
		if err != nil {
			return err
		}
		if len(b.GetArchitectures()) == 0 {
			return fmt.Errorf("project %s has no pool to build in: start an agent, see `docker depot agent token --help`", b.GetProject())
		}
		endpoint, err = driver.ParseEndpoint("depot://" + server.Host + "/" + b.GetProject())
		return err
	})
	return endpoint, err
}

// chooseProject takes the project that is named, else the token's, else the
// only one that the caller may see.
func chooseProject(ctx context.Context, c *client.Client, text string) (*depotv1.ProjectRef, error) {
	if text != "" {
		return parseProject(text)
	}
	who, err := c.Admin.WhoAmI(ctx, &depotv1.WhoAmIRequest{})
	if err != nil {
		return nil, err
	}
	if who.GetProject() != "" {
		return &depotv1.ProjectRef{Organization: who.GetOrganization(), Name: who.GetProject()}, nil
	}
	resp, err := c.Admin.ListProjects(ctx, &depotv1.ListProjectsRequest{})
	if err != nil {
		return nil, err
	}
	projects := resp.GetProjects()
	switch len(projects) {
	case 0:
		return nil, errors.New("there is no project yet: make one with `docker depot project create NAME`")
	case 1:
		return &depotv1.ProjectRef{Id: projects[0].GetId()}, nil
	}
	names := make([]string, 0, len(projects))
	for _, p := range projects {
		names = append(names, fullName(p))
	}
	return nil, fmt.Errorf("there are several projects: name one with --project, of %s", strings.Join(names, ", "))
}
