package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"

	"github.com/opendepot/depot/agent/provider"
	"github.com/opendepot/depot/agent/provider/binfmt"
)

// emulation is what the emulated pools run on, by architecture.
type emulation map[string]binfmt.Registration

// emulate makes the host run the architectures of the emulated pools.
func emulate(ctx context.Context, pools []poolConfig) (emulation, error) {
	e := emulation{}
	for _, p := range pools {
		if !p.emulated {
			continue
		}
		r, err := binfmt.Register(ctx, p.arch)
		if err != nil {
			return nil, fmt.Errorf("pool %q: %w", p.name, err)
		}
		e[p.arch] = r
	}
	return e, nil
}

// warning says that arch is emulated, and by what.
func (e emulation) warning(arch string) string {
	return fmt.Sprintf("emulated: %s runs on %s through QEMU (%s), several times slower than on a host of its own",
		arch, runtime.GOARCH, strings.Join(e[arch].Handlers, ", "))
}

// close takes the emulation away, unless a machine may still need it; then the
// next agent finds it.
func (e emulation) close(ctx context.Context, machines provider.Provider) error {
	if len(e) == 0 {
		return nil
	}
	running, err := machines.List(ctx)
	if err != nil || len(running) > 0 {
		return err
	}
	var errs []error
	for _, r := range e {
		errs = append(errs, r.Remove())
	}
	return errors.Join(errs...)
}
