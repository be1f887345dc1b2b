package depotcmd

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/go-units"
	"github.com/google/uuid"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
)

func (a *app) projectCommand() *cobra.Command {
	return group("project", "Manage projects",
		a.projectCreateCommand(), a.projectListCommand(), a.projectInspectCommand(),
		a.projectUpdateCommand(), a.projectRemoveCommand())
}

// settingsFlags are a project's settings as flags; only those that were given
// are sent.
type settingsFlags struct {
	size         string
	idleTimeout  time.Duration
	maxBuilds    int32
	maxMachines  int32
	cacheKeep    time.Duration
	cacheSize    string
	entitlements []string
}

func (f *settingsFlags) install(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.size, "size", "", "Machine size, by its name in the server's configuration")
	flags.DurationVar(&f.idleTimeout, "idle-timeout", 0, "How long a machine without a build is kept ready, like 2m")
	flags.Int32Var(&f.maxBuilds, "max-builds-per-machine", 0, "Most clients on one machine at once; 0 means no bound")
	flags.Int32Var(&f.maxMachines, "max-machines", 0, "Most machines per architecture")
	flags.DurationVar(&f.cacheKeep, "cache-keep", 0, "How long a cache record is kept after its last use, like 336h")
	flags.StringVar(&f.cacheSize, "cache-size", "", "Size under which the cache is kept, like 50GiB")
	flags.StringSliceVar(&f.entitlements, "allow", nil,
		`Entitlements that builds may ask for: network.host, security.insecure; "" for none`)
	completeWith(cmd, "allow", "network.host", "security.insecure")
}

// settings returns those that were given.
func (f *settingsFlags) settings(cmd *cobra.Command) (*depotv1.ProjectSettings, error) {
	given := cmd.Flags().Changed
	s := &depotv1.ProjectSettings{}
	if given("size") {
		s.Size = &f.size
	}
	if given("idle-timeout") {
		s.IdleTimeout = durationpb.New(f.idleTimeout)
	}
	if given("max-builds-per-machine") {
		s.MaxBuildsPerMachine = &f.maxBuilds
	}
	if given("max-machines") {
		s.MaxMachines = &f.maxMachines
	}
	if given("cache-keep") {
		s.CacheKeep = durationpb.New(f.cacheKeep)
	}
	if given("cache-size") {
		bytes, err := units.RAMInBytes(f.cacheSize)
		if err != nil {
			return nil, usageError(cmd, fmt.Errorf("--cache-size %q is no size: write a number and a unit, like 50GiB", f.cacheSize))
		}
		s.CacheBytes = &bytes
	}
	if given("allow") {
		s.Entitlements = &depotv1.EntitlementList{}
		for _, name := range f.entitlements {
			if name = strings.TrimSpace(name); name != "" {
				s.Entitlements.Names = append(s.Entitlements.Names, name)
			}
		}
	}
	return s, nil
}

func (a *app) projectCreateCommand() *cobra.Command {
	var flags settingsFlags
	cmd := &cobra.Command{
		Use:   "create [OPTIONS] [ORGANIZATION/]NAME",
		Short: "Create a project",
		Args:  exactArgs("a name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			settings, err := flags.settings(cmd)
			if err != nil {
				return err
			}
			ref, err := parseProject(args[0])
			if err != nil {
				return err
			}
			if ref.GetId() != "" {
				return fmt.Errorf("%q cannot be a project's name: prj_ begins an id", args[0])
			}
			return a.withClient(func(c *client.Client) error {
				resp, err := c.Admin.CreateProject(cmd.Context(), &depotv1.CreateProjectRequest{
					RequestId: uuid.NewString(), Organization: ref.GetOrganization(), Name: ref.GetName(), Settings: settings,
				})
				if err != nil {
					return err
				}
				p := resp.GetProject()
				a.println(fullName(p))
				a.notef("Next: docker depot configure --project %s", fullName(p))
				return nil
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	flags.install(cmd)
	return cmd
}

// projectRow is a line of `project ls`.
type projectRow struct {
	ID, Name, Size, IdleTimeout, MaxMachines, CacheKeep, CacheSize, Created string
}

func (r projectRow) id() string { return r.ID }

// FullHeader names the columns.
func (projectRow) FullHeader() any {
	return formatter.SubHeaderContext{
		"ID": "PROJECT ID", "Name": "NAME", "Size": "SIZE", "IdleTimeout": "IDLE TIMEOUT", "MaxMachines": "MAX MACHINES",
		"CacheKeep": "CACHE KEPT", "CacheSize": "CACHE SIZE", "Created": "CREATED",
	}
}

func projectRowOf(p *depotv1.Project, now time.Time) projectRow {
	s := p.GetSettings()
	return projectRow{
		ID: p.GetId(), Name: fullName(p), Size: s.GetSize(),
		IdleTimeout: duration(s.GetIdleTimeout().AsDuration()),
		MaxMachines: strconv.Itoa(int(s.GetMaxMachines())),
		CacheKeep:   units.HumanDuration(s.GetCacheKeep().AsDuration()),
		CacheSize:   units.BytesSize(float64(s.GetCacheBytes())),
		Created:     ago(p.GetCreated(), now),
	}
}

func (a *app) projectListCommand() *cobra.Command {
	var o listOptions
	var organization string
	cmd := &cobra.Command{
		Use:     "ls [OPTIONS]",
		Aliases: []string{"list"},
		Short:   "List projects",
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(func(c *client.Client) error {
				resp, err := c.Admin.ListProjects(cmd.Context(), &depotv1.ListProjectsRequest{Organization: organization})
				if err != nil {
					return err
				}
				rows := make([]projectRow, 0, len(resp.GetProjects()))
				for _, p := range resp.GetProjects() {
					rows = append(rows, projectRowOf(p, time.Now()))
				}
				return list(a.cli.Out(), o, `{{.Name}}\t{{.ID}}\t{{.Size}}\t{{.IdleTimeout}}\t{{.CacheKeep}}\t{{.CacheSize}}\t{{.Created}}`, rows)
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	o.install(cmd)
	cmd.Flags().StringVar(&organization, "organization", "", "Only those of this organization")
	return cmd
}

// projectView is what `project inspect` shows.
type projectView struct {
	ID                  string
	Organization        string
	Name                string
	Size                string
	IdleTimeout         string
	MaxBuildsPerMachine int32
	MaxMachines         int32
	CacheKeep           string
	CacheBytes          int64
	Entitlements        []string
	Created             *time.Time
}

func projectViewOf(p *depotv1.Project) projectView {
	s := p.GetSettings()
	return projectView{
		ID: p.GetId(), Organization: p.GetOrganization(), Name: p.GetName(), Size: s.GetSize(),
		IdleTimeout:         duration(s.GetIdleTimeout().AsDuration()),
		MaxBuildsPerMachine: s.GetMaxBuildsPerMachine(), MaxMachines: s.GetMaxMachines(),
		CacheKeep: duration(s.GetCacheKeep().AsDuration()), CacheBytes: s.GetCacheBytes(),
		Entitlements: append([]string{}, s.GetEntitlements().GetNames()...), Created: timeOf(p.GetCreated()),
	}
}

func (a *app) projectInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "inspect [OPTIONS] PROJECT [PROJECT...]",
		Short: "Show projects with their settings",
		Args:  atLeastOne("project"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(func(c *client.Client) error {
				return inspectAll(a.cli.Out(), args, format, func(name string) (any, error) {
					p, err := getProject(cmd.Context(), c, name)
					if err != nil {
						return nil, err
					}
					return projectViewOf(p), nil
				})
			})
		},
		ValidArgsFunction: a.completeProjects,
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", `Format output: "json" or a Go template`)
	completeWith(cmd, "format", "json")
	return cmd
}

func (a *app) projectUpdateCommand() *cobra.Command {
	var flags settingsFlags
	cmd := &cobra.Command{
		Use:   "update [OPTIONS] PROJECT",
		Short: "Change a project's settings",
		Args:  exactArgs("a project"),
		RunE: func(cmd *cobra.Command, args []string) error {
			settings, err := flags.settings(cmd)
			if err != nil {
				return err
			}
			if cmd.Flags().NFlag() == 0 {
				return usageError(cmd, fmt.Errorf("no setting was given: nothing to change"))
			}
			ref, err := parseProject(args[0])
			if err != nil {
				return err
			}
			return a.withClient(func(c *client.Client) error {
				resp, err := c.Admin.UpdateProject(cmd.Context(), &depotv1.UpdateProjectRequest{Project: ref, Settings: settings})
				if err != nil {
					return err
				}
				a.println(fullName(resp.GetProject()))
				return nil
			})
		},
		ValidArgsFunction: a.completeProjects,
	}
	flags.install(cmd)
	return cmd
}

func (a *app) projectRemoveCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:     "rm [OPTIONS] PROJECT [PROJECT...]",
		Aliases: []string{"remove"},
		Short:   "Delete projects with their caches",
		Args:    atLeastOne("project"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return a.withClient(func(c *client.Client) error {
				return a.each(args, func(name string) error {
					p, err := getProject(ctx, c, name)
					if err != nil {
						return err
					}
					if !force {
						if err := a.confirm(ctx, fmt.Sprintf("This deletes project %s, its machines and its caches.", fullName(p))); err != nil {
							return err
						}
					}
					_, err = c.Admin.DeleteProject(ctx, &depotv1.DeleteProjectRequest{Project: &depotv1.ProjectRef{Id: p.GetId()}, Force: force})
					return err
				})
			})
		},
		ValidArgsFunction: a.completeProjects,
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Do not ask, and delete though builds run")
	return cmd
}

// getProject finds a project by what a person wrote.
func getProject(ctx context.Context, c *client.Client, text string) (*depotv1.Project, error) {
	ref, err := parseProject(text)
	if err != nil {
		return nil, err
	}
	resp, err := c.Admin.GetProject(ctx, &depotv1.GetProjectRequest{Project: ref})
	if err != nil {
		return nil, err
	}
	return resp.GetProject(), nil
}

func fullName(p *depotv1.Project) string { return p.GetOrganization() + "/" + p.GetName() }

// completeProjects offers the names of projects that are not yet given.
func (a *app) completeProjects(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, args, func(ctx context.Context, c *client.Client) ([]string, error) {
		resp, err := c.Admin.ListProjects(ctx, &depotv1.ListProjectsRequest{})
		names := make([]string, 0, len(resp.GetProjects()))
		for _, p := range resp.GetProjects() {
			names = append(names, fullName(p))
		}
		return names, err
	})
}

// complete asks the server for names, quickly, and offers those that are not
// among args.
func (a *app) complete(cmd *cobra.Command, args []string, find func(context.Context, *client.Client) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := quickly(cmd.Context())
	defer cancel()
	var offers []string
	err := a.withClient(func(c *client.Client) error {
		names, err := find(ctx, c)
		offers = without(names, args)
		return err
	})
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return offers, cobra.ShellCompDirectiveNoFileComp
}

func without(names, taken []string) []string {
	var left []string
	for _, name := range names {
		if !slices.Contains(taken, name) {
			left = append(left, name)
		}
	}
	return left
}
