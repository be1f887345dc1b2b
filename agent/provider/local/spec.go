package local

import (
	"fmt"
	"slices"
	"strings"

	"github.com/opendepot/depot/agent/provider"
)

// validate checks what reaches paths and names.
func validate(spec provider.MachineSpec) error {
	if err := validID(spec.ID); err != nil {
		return fmt.Errorf("machine id: %w", err)
	}
	if err := validID(spec.Volume); err != nil {
		return fmt.Errorf("volume id: %w", err)
	}
	if spec.Arch != "amd64" && spec.Arch != "arm64" {
		return fmt.Errorf("architecture %q: %w: want amd64 or arm64", spec.Arch, provider.ErrUnusable)
	}
	if spec.CPUs < 0 || spec.MemoryBytes < 0 {
		return fmt.Errorf("size of %d CPUs and %d bytes: %w: want 0 or more", spec.CPUs, spec.MemoryBytes, provider.ErrUnusable)
	}
	for name := range spec.Files {
		if strings.Trim(name, lowerCase+strings.ToUpper(lowerCase)+"0123456789-_.") != "" || strings.HasPrefix(name, ".") ||
			slices.Contains([]string{"", "relay", "state"}, name) {
			return fmt.Errorf("file %.60q: %w: want a plain name, and neither relay nor state", name, provider.ErrUnusable)
		}
	}
	return nil
}

// validID allows ids as the control plane makes them, a kind and a UUID: they
// become names of files, containers and cgroups.
func validID(id string) error {
	kind, number, _ := strings.Cut(id, "_")
	if kind == "" || len(kind) > 16 || strings.Trim(kind, lowerCase) != "" || len(number) != 32 || strings.Trim(number, "0123456789abcdef") != "" {
		return fmt.Errorf("%.60q: %w: want an id such as machine_0190f1c2a3b47c5d8e9f0a1b2c3d4e5f", id, provider.ErrUnusable)
	}
	return nil
}

const lowerCase = "abcdefghijklmnopqrstuvwxyz"
