package plugin

import (
	"fmt"
	"strings"

	"github.com/opendepot/depot/driver"
	"github.com/spf13/cobra"
)

// wrapCreate gives buildx's create what it lacks for this driver. Without an
// endpoint argument buildx ignores --use, so the default endpoint is put in
// its place; and a config file for buildkitd is refused here, because the
// driver itself cannot tell it from a default one of the user's.
func wrapCreate(root *cobra.Command, app *App) {
	create, _, err := root.Find([]string{"create"})
	if err != nil || create.RunE == nil {
		return // a buildx without the command has nothing to wrap
	}
	run := create.RunE
	create.RunE = func(cmd *cobra.Command, args []string) error {
		ours, err := forDepot(cmd, args)
		if err != nil {
			return err
		}
		if !ours {
			return run(cmd, args)
		}
		for _, name := range []string{"buildkitd-config", "config"} {
			if cmd.Flags().Changed(name) {
				return fmt.Errorf("--%s cannot be used with the depot driver: buildkitd runs on machines that the project's settings configure, see `docker depot project update --help`", name)
			}
		}
		if len(args) == 0 {
			endpoint, err := app.Drivers.DefaultEndpoint(cmd.Context())
			if err != nil {
				return err
			}
			args = []string{endpoint}
		}
		return run(cmd, args)
	}
}

// forDepot reports whether a create makes nodes of this driver, and names the
// driver where only the endpoint does.
func forDepot(cmd *cobra.Command, args []string) (bool, error) {
	flags := cmd.Flags()
	if leave, err := flags.GetBool("leave"); err != nil || leave {
		return false, err
	}
	name, err := flags.GetString("driver")
	if err != nil {
		return false, err
	}
	if name == "" && len(args) == 1 && strings.HasPrefix(args[0], driver.Name+"://") {
		return true, flags.Set("driver", driver.Name)
	}
	return name == driver.Name, nil
}
