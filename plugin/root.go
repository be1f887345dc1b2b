package plugin

import (
	"fmt"

	"github.com/docker/buildx/version"
	"github.com/docker/cli/cli"
	cliplugin "github.com/docker/cli/cli-plugins/plugin"
	"github.com/docker/cli/cli/command"
	cliflags "github.com/docker/cli/cli/flags"
	"github.com/moby/buildkit/util/appcontext"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/driver"
	"github.com/opendepot/depot/driver/credentials"
	"github.com/opendepot/depot/plugin/depotcmd"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// App is what every command of `docker depot` gets.
type App struct {
	// CLI is the Docker CLI: its streams, configuration and current context.
	CLI *command.DockerCli
	// Drivers is the registered driver; it knows the default endpoint.
	Drivers *driver.Factory
	// Credentials says which server to talk to, and as whom.
	Credentials credentials.Source
	// UserAgent names this program and its version to servers.
	UserAgent string
	// Env looks up an environment variable; empty means unset.
	Env func(string) string
}

// Client returns a client for the named server as the caller; an empty name
// means the default server.
func (a *App) Client(server string) (*client.Client, error) {
	var err error
	if server == "" {
		if server, err = a.Credentials.Server(); err != nil {
			return nil, err
		}
	}
	cfg, err := a.Credentials.Config(server)
	if err != nil {
		return nil, err
	}
	cfg.UserAgent = a.UserAgent
	return client.New(cfg)
}

// NewRootCommand returns `docker depot`, to be run as a plugin or standalone.
func NewRootCommand(name string, standalone bool, app *App) *cobra.Command {
	root := &cobra.Command{
		Use:               name,
		Short:             "Depot",
		Long:              "Set up and look after remote builds",
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		PersistentPreRunE: func(cmd *cobra.Command, args []string) error {
			cmd.SetContext(appcontext.Context())
			if standalone {
				return initialize(cmd, app.CLI)
			}
			return cliplugin.PersistentPreRunE(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return cli.StatusError{
				StatusCode: 1,
				Status:     fmt.Sprintf("ERROR: unknown command %q: see `docker depot --help`", args[0]),
			}
		},
		DisableFlagsInUseLine: true,
	}
	if standalone {
		root.SilenceUsage = true
		root.SilenceErrors = true
		root.TraverseChildren = true
	}
	root.AddCommand(newVersionCommand(app))
	root.AddCommand(depotcmd.Commands(app.CLI, depotcmd.Deps{Version: version.Version, Source: app.Credentials})...)
	return root
}

// initialize does what the Docker CLI does for a plugin: it reads the
// configuration and the variables such as DOCKER_HOST.
func initialize(cmd *cobra.Command, docker *command.DockerCli) error {
	flags := pflag.NewFlagSet(cmd.DisplayName(), pflag.ContinueOnError)
	options := cliflags.NewClientOptions()
	options.InstallFlags(flags)
	options.SetDefaultOptions(flags)
	return docker.Initialize(options)
}

func newVersionCommand(app *App) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the version of the plugin and of the buildx in it",
		Args:  cli.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintf(app.CLI.Out(), "depot, with %s %s %s\n", version.Package, version.Version, version.Revision)
			return err
		},
	}
}
