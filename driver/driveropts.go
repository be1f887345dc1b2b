package driver

import (
	"fmt"
	"strconv"
	"time"
)

// driverOpts are the --driver-opt values of a builder. A token is never among
// them: a builder's configuration is shown by inspect and copied around.
type driverOpts struct {
	// isolated asks for machines that nothing trusted runs on, with an empty
	// cache that is destroyed with them.
	isolated bool
	// defaultLoad loads a build without output into the local engine.
	defaultLoad bool
	// waitTimeout bounds the wait for a machine; 0 means no bound.
	waitTimeout time.Duration
}

func parseDriverOpts(opts map[string]string) (driverOpts, error) {
	var o driverOpts
	for name, value := range opts {
		var err error
		switch name {
		case "isolated":
			o.isolated, err = strconv.ParseBool(value)
		case "default-load":
			o.defaultLoad, err = strconv.ParseBool(value)
		case "wait-timeout":
			o.waitTimeout, err = time.ParseDuration(value)
			if err == nil && o.waitTimeout < 0 {
				err = fmt.Errorf("it is negative")
			}
		case "token":
			return o, fmt.Errorf("a token does not belong into a builder's configuration: use `docker depot login` or DEPOT_TOKEN")
		default:
			return o, fmt.Errorf("driver-opt %q is not known to the depot driver: use isolated=true|false, default-load=true|false or wait-timeout=<duration>", name)
		}
		if err != nil {
			return o, fmt.Errorf("driver-opt %s=%s is not valid: %w", name, value, err)
		}
	}
	return o, nil
}
