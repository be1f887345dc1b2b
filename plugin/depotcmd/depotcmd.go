// Package depotcmd is the `docker depot` command: the only front end of a
// depot control plane on the command line. It logs in, administers projects,
// tokens, machines, pools and agents, configures the docker CLI of this user,
// runs a control plane and an agent on this host, and explains what is wrong
// when a build does not find its machine.
//
// Commands behave like docker's own: names on standard output, everything else
// on standard error; --format takes table, json or a Go template; --quiet
// prints ids; a wrong usage exits with 125 and a refusal with 1.
package depotcmd

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/opendepot/depot/driver/credentials"
	"github.com/spf13/cobra"
)

// usageExitCode is docker's exit code for a command that was used wrongly.
const usageExitCode = 125

// Vendor is what the docker CLI shows as this program's maker.
const Vendor = "OpenDepot"

// Deps is what the commands need of the program around them.
type Deps struct {
	// Version is the program's, for the server's log and for comparing.
	Version string
	// Executable is the program's own file; empty means that of the process.
	Executable string
	// Source says which server to talk to, as whom, about which project.
	Source credentials.Source
}

// app is what every command stands on.
type app struct {
	cli  command.Cli
	deps Deps
}

// NewDepotCommand returns the command `depot` with all of its subcommands.
func NewDepotCommand(dockerCli command.Cli, deps Deps) *cobra.Command {
	cmd := group("depot", "Build on machines of your own", Commands(dockerCli, deps)...)
	cmd.Long = "Build on machines of your own: docker build, docker buildx and docker compose build run unchanged,\n" +
		"while the work happens on ephemeral machines that run BuildKit next to a cache that outlives them."
	cmd.SetFlagErrorFunc(usageError)
	return cmd
}

// Commands returns the subcommands, for a root that is made elsewhere.
func Commands(dockerCli command.Cli, deps Deps) []*cobra.Command {
	a := &app{cli: dockerCli, deps: deps}
	cmds := []*cobra.Command{
		a.upCommand(), a.downCommand(), a.configureCommand(), a.doctorCommand(),
		a.loginCommand(), a.logoutCommand(), a.whoamiCommand(),
		a.projectCommand(), a.tokenCommand(), a.machineCommand(), a.poolCommand(), a.agentCommand(),
	}
	for _, cmd := range cmds {
		cmd.SetFlagErrorFunc(usageError)
	}
	return cmds
}

// executable returns the program's own file, links resolved.
func (a *app) executable() (string, error) {
	path, err := a.deps.Executable, error(nil)
	if path == "" {
		path, err = os.Executable()
	}
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return "", fmt.Errorf("find the program's own file: %w", err)
	}
	return path, nil
}

// group returns a command that only holds others.
func group(use, short string, subcommands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.ArbitraryArgs, RunE: showHelp}
	cmd.AddCommand(subcommands...)
	return cmd
}

// showHelp is run where a subcommand is missing or not known.
func showHelp(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	return cli.StatusError{
		StatusCode: usageExitCode,
		Status:     fmt.Sprintf("unknown command %q: run `docker %s --help`", "docker "+commandPath(cmd)+" "+args[0], commandPath(cmd)),
	}
}

// usageError reports a flag that cannot be.
func usageError(cmd *cobra.Command, err error) error {
	if err == nil {
		return nil
	}
	return cli.StatusError{
		StatusCode: usageExitCode,
		Status:     fmt.Sprintf("%s\nSee 'docker %s --help'", err, commandPath(cmd)),
	}
}

// commandPath is cmd's path from `depot` on, whatever the root is called.
func commandPath(cmd *cobra.Command) string {
	if cmd.Name() == "depot" || !cmd.HasParent() {
		return "depot"
	}
	return commandPath(cmd.Parent()) + " " + cmd.Name()
}

// exactArgs refuses any other number of arguments, with names in the message.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == len(names) {
			return nil
		}
		want := "no argument"
		for i, name := range names {
			if i == 0 {
				want = name
				continue
			}
			want += " and " + name
		}
		return cli.StatusError{
			StatusCode: usageExitCode,
			Status:     fmt.Sprintf("`docker %s` takes %s, not %d arguments\nUsage:  docker %s", commandPath(cmd), want, len(args), usageLine(cmd)),
		}
	}
}

// atMostOne refuses more than one argument.
func atMostOne(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) <= 1 {
			return nil
		}
		return exactArgs("at most one "+name)(cmd, args)
	}
}

// atLeastOne refuses an empty list of arguments.
func atLeastOne(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return nil
		}
		return cli.StatusError{
			StatusCode: usageExitCode,
			Status:     fmt.Sprintf("`docker %s` takes at least one %s\nUsage:  docker %s", commandPath(cmd), name, usageLine(cmd)),
		}
	}
}

func usageLine(cmd *cobra.Command) string {
	if cmd.Name() == "depot" || !cmd.HasParent() {
		return cmd.Use
	}
	return commandPath(cmd.Parent()) + " " + cmd.Use
}
