package main

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/opendepot/depot/agent/machine"
)

func machineCommand(w world) *cobra.Command {
	var config, format, level string
	cmd := &cobra.Command{
		Use:   "machine",
		Short: "Be PID 1 of a machine; started by whatever launches machines",
		Args:  cobra.NoArgs,
		PreRunE: func(cmd *cobra.Command, _ []string) error {
			return fromEnvironment(cmd.Flags(), w.lookup)
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := machine.LoadConfig(config)
			if err != nil {
				return err
			}
			w.errOut = machine.BoundLog(w.errOut)
			log, err := newLog(w, format, level)
			if err != nil {
				return err
			}
			fds, _ := w.lookup("LISTEN_FDS")
			n, err := strconv.Atoi(fds)
			if err != nil {
				return fmt.Errorf("LISTEN_FDS is %q: a machine is handed its listening socket by whatever launches it", fds)
			}
			listener, err := machine.Inherited(n)
			if err != nil {
				return err
			}
			// Signals ask the machine to drain; they do not cut it off.
			return machine.Run(context.WithoutCancel(cmd.Context()), c, machine.Surroundings{
				Listener: listener, Terminate: w.terminate, Output: w.errOut, Log: log,
			})
		},
	}
	cmd.Flags().StringVar(&config, "config", "/run/depot/machine.json", "what the machine must know before it has registered")
	cmd.Flags().StringVar(&format, "log-format", "text", "text or json")
	cmd.Flags().StringVar(&level, "log-level", "info", "debug, info, warn or error")
	return cmd
}
