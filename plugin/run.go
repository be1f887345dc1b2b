package plugin

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/docker/buildx/commands"
	"github.com/docker/buildx/version"
	"github.com/docker/cli/cli-plugins/metadata"
	cliplugin "github.com/docker/cli/cli-plugins/plugin"
	"github.com/docker/cli/cli/command"
	cliconfig "github.com/docker/cli/cli/config"
	"github.com/moby/buildkit/util/stack"
	"github.com/moby/buildkit/util/tracing/detect"
	"github.com/opendepot/depot/driver"
	"github.com/opendepot/depot/driver/credentials"
	"github.com/spf13/cobra"
	"go.opentelemetry.io/otel"

	// The drivers beside ours that work without a cluster or an account
	// elsewhere; the others would cost each command start-up time.
	_ "github.com/docker/buildx/driver/docker"
	_ "github.com/docker/buildx/driver/docker-container"
	_ "github.com/docker/buildx/driver/remote"

	// BuildKit's messages are encoded without reflection.
	_ "github.com/moby/buildkit/util/grpcutil/encoding/proto"

	// Traces of a parent process go on here.
	_ "github.com/moby/buildkit/util/tracing/childprocess"
)

// The names that the binary is installed under, without docker's prefix.
const (
	buildxName = "buildx"
	depotName  = "depot"
)

// vendor is what `docker info` shows for both plugins.
const vendor = "OpenDepot"

// releaseTimeout is how long the program's end may be held up by leases.
const releaseTimeout = 2 * time.Second

// Process is what main takes from the operating system.
type Process struct {
	// Args are the program's name and arguments.
	Args []string
	// Env looks up an environment variable; empty means unset.
	Env func(string) string
	// Dir is the working directory: the search for depot.json starts there.
	Dir string
}

// Run is the program. It returns the exit code.
func Run(ctx context.Context, p Process) int {
	stack.SetVersionInfo(version.Version, version.Revision)
	detect.ServiceName = buildxName
	otel.SetErrorHandler(silent{}) // a collector that is down must not spoil the output
	cli, err := command.NewDockerCli(command.WithBaseContext(ctx))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	app := newApp(p, cli)
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
		defer cancel()
		app.Drivers.ReleaseAll(ctx)
	}()
	defer startProfiles(p.Env, cli.Err())()
	if cliplugin.RunningStandalone() {
		defer app.flushMetrics(ctx)
	}
	return report(cli.Err(), app.execute(p)) //nolint:contextcheck // commands run under buildx's own context, which signals end
}

// newApp wires what the commands share.
func newApp(p Process, cli *command.DockerCli) *App {
	source := credentials.Source{
		Env: p.Env,
		Dir: p.Dir,
		Store: credentials.Store{Dir: func() string {
			return filepath.Join(cliconfig.Dir(), depotName)
		}},
	}
	app := &App{CLI: cli, Credentials: source, UserAgent: "docker-depot/" + version.Version, Env: p.Env}
	app.Drivers = driver.Register(driver.Options{Credentials: source, UserAgent: app.UserAgent, Stderr: os.Stderr})
	return app
}

// execute runs the command as a plugin of the Docker CLI, or, called by its
// own name, without one: Compose calls docker-buildx like that.
func (a *App) execute(p Process) error {
	name := strings.TrimSuffix(filepath.Base(p.Args[0]), ".exe")
	standalone := cliplugin.RunningStandalone()
	var root *cobra.Command
	switch {
	case strings.TrimPrefix(name, "docker-") == depotName && standalone:
		root = NewRootCommand(name, standalone, a)
	case strings.TrimPrefix(name, "docker-") == depotName:
		root = NewRootCommand(depotName, standalone, a)
	case standalone:
		root = commands.NewRootCmd(name, false, a.CLI)
		wrapCreate(root, a)
	default:
		root = commands.NewRootCmd(buildxName, true, a.CLI)
		wrapCreate(root, a)
	}
	if standalone {
		return root.Execute()
	}
	return cliplugin.RunPlugin(a.CLI, root, metadata.Metadata{
		SchemaVersion: "0.1.0", Vendor: vendor, Version: version.Version,
	})
}

// flushMetrics sends what was measured. The Docker CLI's library does it for
// plugins only.
func (a *App) flushMetrics(ctx context.Context) {
	if mp, ok := a.CLI.MeterProvider().(command.MeterProvider); ok {
		if err := mp.ForceFlush(ctx); err != nil {
			otel.Handle(err)
		}
	}
}

// silent takes the errors of telemetry.
type silent struct{}

// Handle does nothing.
func (silent) Handle(error) {}
