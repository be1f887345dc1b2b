package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/opendepot/depot/controlplane"
	"github.com/opendepot/depot/controlplane/store"
)

// newRecoverCommand raises the epoch of a store that was restored from a
// backup. Agents refuse a control plane whose epoch is lower than one they
// have seen; saying that the restored one is the real one is a person's
// decision, made while no other runs.
func newRecoverCommand(lookup func(string) (string, bool)) *cobra.Command {
	var c config
	var seen uint32
	cmd := &cobra.Command{
		Use:   "recover --epoch N",
		Short: "Make a store that was restored from a backup the one that agents obey",
		Long: "Agents refuse a control plane that is at a lower epoch than they have seen. After a restore from a backup, and once no other\n" +
			"control plane runs on this state, recover raises the store's epoch above N, the one that the refusal names.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return withStore(cmd, &c, lookup, func(ctx context.Context, s *store.Store) error {
				var record controlplane.Server
				err := s.Update(ctx, func(tx controlplane.Tx) (err error) {
					if record, err = tx.Server(ctx); err != nil {
						return err
					}
					if record.Epoch > seen {
						return fmt.Errorf("the store is at epoch %d, above %d already: start the control plane", record.Epoch, seen)
					}
					record.Epoch = seen
					return tx.PutServer(ctx, record)
				})
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "epoch raised to %d: start the control plane\n", record.Epoch)
				return err
			})
		},
	}
	c.dataFlags(cmd.Flags())
	cmd.Flags().Uint32Var(&seen, "epoch", 0, "the highest epoch that an agent has seen")
	_ = cmd.MarkFlagRequired("epoch")
	return cmd
}

// newBackupCommand writes a consistent copy of the database.
func newBackupCommand(lookup func(string) (string, bool)) *cobra.Command {
	var c config
	cmd := &cobra.Command{
		Use:   "backup FILE",
		Short: "Write a consistent copy of the database of a stopped control plane",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return withStore(cmd, &c, lookup, func(ctx context.Context, s *store.Store) error {
				return s.Backup(ctx, args[0])
			})
		},
	}
	c.dataFlags(cmd.Flags())
	return cmd
}

func withStore(cmd *cobra.Command, c *config, lookup func(string) (string, bool), fn func(context.Context, *store.Store) error) error {
	if err := environment(cmd.Flags(), lookup); err != nil {
		return err
	}
	if _, err := os.Stat(c.DataDir); err != nil {
		return fmt.Errorf("--data-dir: %w", err)
	}
	s, err := openStore(cmd.Context(), c, store.Config{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	err = fn(cmd.Context(), s)
	if cerr := s.Close(); err == nil {
		err = cerr
	}
	return err
}
