package main

import (
	"context"
	"errors"
)

// emulate makes the host run the emulated pools' architectures, and returns a
// warning for each.
func emulate(_ context.Context, pools []poolConfig) (map[string]string, error) {
	for _, p := range pools {
		if p.emulated {
			return nil, errors.New("emulation is not wired yet")
		}
	}
	return nil, nil
}
