package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// execute runs the command that w.args name.
func execute(ctx context.Context, w world) error {
	root := &cobra.Command{
		Use:           "depot-agent",
		Short:         "Runs on the hosts that build",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetArgs(w.args)
	root.SetOut(w.out)
	root.SetErr(w.errOut)
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(cloudCommand(w), machineCommand(w)) //nolint:contextcheck // cobra hands the context to RunE
	root.AddCommand(&cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintln(w.out, "depot-agent", w.version)
			return err
		},
	})
	return root.ExecuteContext(ctx)
}

func cloudCommand(w world) *cobra.Command {
	var c cloudConfig
	cmd := &cobra.Command{
		Use:   "cloud",
		Short: "Serve a control plane: launch machines and keep volumes on this host",
		Long: "Serve a control plane: launch machines and keep volumes on this host.\n\n" +
			"Each flag has an environment variable: --state-dir is DEPOT_AGENT_STATE_DIR. Flags that may be repeated\n" +
			"take several values from it, separated by spaces. The token is read from --token-file or DEPOT_AGENT_TOKEN,\n" +
			"and is needed for the first start only. Machines go on when the agent is stopped.",
		Args: cobra.NoArgs,
		PreRunE: func(cmd *cobra.Command, _ []string) error {
			return fromEnvironment(cmd.Flags(), w.lookup)
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			c.token, _ = w.lookup("DEPOT_AGENT_TOKEN")
			return runCloud(cmd.Context(), c, w)
		},
	}
	c.bind(cmd.Flags())
	return cmd
}

// fromEnvironment gives flags that are not on the command line the values of
// their variables.
func fromEnvironment(flags *pflag.FlagSet, lookup func(string) (string, bool)) error {
	var errs []error
	flags.VisitAll(func(f *pflag.Flag) {
		name := "DEPOT_AGENT_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		value, ok := lookup(name)
		if !ok || value == "" || f.Changed || f.Name == "help" {
			return
		}
		values := []string{value}
		if _, many := f.Value.(pflag.SliceValue); many {
			values = strings.Fields(value)
		}
		for _, v := range values {
			if err := flags.Set(f.Name, v); err != nil {
				errs = append(errs, fmt.Errorf("the environment variable %s: %w", name, err))
			}
		}
	})
	return errors.Join(errs...)
}

// newLog returns the program's log.
func newLog(w world, format, level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("--log-level %q: use debug, info, warn or error", level)
	}
	opts := &slog.HandlerOptions{Level: l}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w.errOut, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w.errOut, opts)), nil
	default:
		return nil, fmt.Errorf("--log-format %q: use text or json", format)
	}
}
