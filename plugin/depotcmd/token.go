package depotcmd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/docker/cli/cli/command/formatter"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/driver/credentials"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
)

// The kinds of token.
const (
	kindUser    = "user"
	kindProject = "project"
	kindAgent   = "agent"
)

func (a *app) tokenCommand() *cobra.Command {
	return group("token", "Manage tokens", a.tokenCreateCommand(), a.tokenListCommand(), a.tokenRemoveCommand())
}

type tokenFlags struct {
	project, organization, role, name string
	lifetime                          time.Duration
}

// request decides what kind of token the flags ask for.
func (f tokenFlags) request() (*depotv1.CreateTokenRequest, error) {
	req := &depotv1.CreateTokenRequest{Name: f.name, Role: f.role}
	switch {
	case f.lifetime < 0:
		return nil, fmt.Errorf("--expires %s is in the past: give a positive duration, like 720h", f.lifetime)
	case f.lifetime > 0:
		req.Lifetime = durationpb.New(f.lifetime)
	}
	if f.project != "" && f.organization != "" {
		return nil, errors.New("a token is for a project or for an organization: give one of --project and --organization")
	}
	if f.project != "" {
		ref, err := parseProject(f.project)
		req.Kind, req.Project = kindProject, ref
		return req, err
	}
	req.Kind = kindUser
	if f.organization != "" {
		req.Project = &depotv1.ProjectRef{Organization: f.organization}
	}
	return req, nil
}

func (a *app) tokenCreateCommand() *cobra.Command {
	var f tokenFlags
	cmd := &cobra.Command{
		Use:   "create [OPTIONS] NAME",
		Short: "Create a token and print it, once",
		Long: "Create a token and print it, once. With --project it is for that project's builds, in CI for example;\n" +
			"otherwise it is a person's, in an organization. NAME is what listings show.",
		Example: "  docker depot token create --project acme/web --expires 720h ci\n" +
			"  docker depot token create --organization acme --role admin ada",
		Args: exactArgs("a name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.name = args[0]
			req, err := f.request()
			if err != nil {
				return usageError(cmd, err)
			}
			return a.printToken(cmd.Context(), req, "It is shown this once: give it as "+credentials.EnvToken+" or to `docker depot login`.")
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	flags := cmd.Flags()
	flags.StringVar(&f.project, "project", "", "The project that the token is for")
	flags.StringVar(&f.organization, "organization", "", "The organization of a person's token")
	flags.StringVar(&f.role, "role", "", "What it may do: viewer, builder or admin (default builder)")
	flags.DurationVar(&f.lifetime, "expires", 0, "How long it is good for, like 720h; 0 means until it is deleted")
	a.completeProjectFlag(cmd)
	completeWith(cmd, "role", "viewer", "builder", "admin")
	return cmd
}

// printToken creates a token and prints its secret on standard output and the
// rest beside it, so that `$(…)` and redirection get the token alone.
func (a *app) printToken(ctx context.Context, req *depotv1.CreateTokenRequest, note string) error {
	return a.withClient(func(c *client.Client) error {
		resp, err := c.Admin.CreateToken(ctx, req)
		if err != nil {
			return err
		}
		a.println(resp.GetSecret())
		a.notef("Token %s (%s) expires %s. %s", resp.GetToken().GetId(), resp.GetToken().GetName(), until(resp.GetToken().GetExpires(), time.Now()), note)
		return nil
	})
}

// tokenRow is a line of `token ls`.
type tokenRow struct {
	ID, Kind, Name, Scope, Role, Created, Expires, LastUsed string
}

func (r tokenRow) id() string { return r.ID }

// FullHeader names the columns.
func (tokenRow) FullHeader() any {
	return formatter.SubHeaderContext{
		"ID": "TOKEN ID", "Kind": "KIND", "Name": "NAME", "Scope": "SCOPE", "Role": "ROLE",
		"Created": "CREATED", "Expires": "EXPIRES", "LastUsed": "LAST USED",
	}
}

func tokenRowOf(t *depotv1.Token, now time.Time) tokenRow {
	scope := "server"
	switch {
	case t.GetProject() != "":
		scope = t.GetOrganization() + "/" + t.GetProject()
	case t.GetOrganization() != "":
		scope = t.GetOrganization()
	}
	return tokenRow{
		ID: t.GetId(), Kind: t.GetKind(), Name: t.GetName(), Scope: scope, Role: t.GetRole(),
		Created: ago(t.GetCreated(), now), Expires: until(t.GetExpires(), now), LastUsed: ago(t.GetLastUsed(), now),
	}
}

func (a *app) tokenListCommand() *cobra.Command {
	var o listOptions
	var project string
	cmd := &cobra.Command{
		Use:     "ls [OPTIONS]",
		Aliases: []string{"list"},
		Short:   "List tokens, without their secrets",
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			req := &depotv1.ListTokensRequest{}
			if project != "" {
				ref, err := parseProject(project)
				if err != nil {
					return err
				}
				req.Project = ref
			}
			return a.withClient(func(c *client.Client) error {
				resp, err := c.Admin.ListTokens(cmd.Context(), req)
				if err != nil {
					return err
				}
				rows := make([]tokenRow, 0, len(resp.GetTokens()))
				for _, t := range resp.GetTokens() {
					rows = append(rows, tokenRowOf(t, time.Now()))
				}
				return list(a.cli.Out(), o, `{{.ID}}\t{{.Kind}}\t{{.Name}}\t{{.Scope}}\t{{.Role}}\t{{.Created}}\t{{.Expires}}\t{{.LastUsed}}`, rows)
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	o.install(cmd)
	cmd.Flags().StringVar(&project, "project", "", "Only those of this project")
	a.completeProjectFlag(cmd)
	return cmd
}

func (a *app) tokenRemoveCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:     "rm [OPTIONS] ID [ID...]",
		Aliases: []string{"remove"},
		Short:   "Revoke tokens and end the leases that they hold",
		Args:    atLeastOne("token id"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return a.withClient(func(c *client.Client) error {
				return a.each(args, func(id string) error {
					if !force {
						if err := a.confirm(ctx, fmt.Sprintf("This revokes token %s and ends the builds that use it.", id)); err != nil {
							return err
						}
					}
					_, err := c.Admin.DeleteToken(ctx, &depotv1.DeleteTokenRequest{Id: id})
					return err
				})
			})
		},
		ValidArgsFunction: a.completeTokens,
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Do not ask")
	return cmd
}

func (a *app) completeTokens(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, args, func(ctx context.Context, c *client.Client) ([]string, error) {
		resp, err := c.Admin.ListTokens(ctx, &depotv1.ListTokensRequest{})
		ids := make([]string, 0, len(resp.GetTokens()))
		for _, t := range resp.GetTokens() {
			ids = append(ids, t.GetId())
		}
		return ids, err
	})
}
