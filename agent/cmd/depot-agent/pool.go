package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// poolConfig is one --pool.
type poolConfig struct {
	name     string
	arch     string
	max      int // machines at once
	emulated bool
}

// parsePools reads --pool values on a host of the native architecture with
// that many processors.
func parsePools(texts []string, native string, processors int) ([]poolConfig, error) {
	if len(texts) == 0 {
		texts = []string{"arch=" + native}
	}
	var pools []poolConfig
	var errs []error
	names := map[string]bool{}
	for _, text := range texts {
		p, err := parsePool(text, native, processors)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("--pool %q: %w", text, err))
		case names[p.name]:
			errs = append(errs, fmt.Errorf("--pool %q: there is another pool named %s: give each a name=…", text, p.name))
		}
		names[p.name] = true
		pools = append(pools, p)
	}
	return pools, errors.Join(errs...)
}

// parsePool reads arch=amd64|arm64[,name=NAME][,max=N][,emulated].
func parsePool(text, native string, processors int) (poolConfig, error) {
	p := poolConfig{max: max(2, processors)}
	for field := range strings.SplitSeq(text, ",") {
		key, value, _ := strings.Cut(field, "=")
		switch key {
		case "arch":
			p.arch = value
		case "name":
			if value == "" || strings.Trim(value, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
				return p, fmt.Errorf("the name %q is not valid: use a-z, 0-9 and -", value)
			}
			p.name = value
		case "max":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 || n > 256 {
				return p, fmt.Errorf("max=%s is not valid: use 1 to 256 machines", value)
			}
			p.max = n
		case "emulated":
			if field != "emulated" && field != "emulated=true" {
				return p, fmt.Errorf("%q is not valid: write emulated, or leave it out", field)
			}
			p.emulated = true
		default:
			return p, fmt.Errorf("%q is not known: use arch=amd64|arm64, name=NAME, max=MACHINES and emulated", field)
		}
	}
	switch {
	case !slices.Contains([]string{"amd64", "arm64"}, p.arch):
		return p, fmt.Errorf("the architecture %q is not known: give arch=amd64 or arch=arm64", p.arch)
	case p.arch != native && !p.emulated:
		return p, fmt.Errorf("this host is %s and cannot run %s natively: start an agent on an %[2]s host, "+
			"or add \",emulated\" to run it through QEMU, several times slower", native, p.arch)
	case p.arch == native && p.emulated:
		return p, fmt.Errorf("this host is %s itself: leave out \"emulated\"", native)
	}
	if p.name == "" {
		p.name = "local-" + p.arch
	}
	return p, nil
}
