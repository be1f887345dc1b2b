package driver

import (
	"fmt"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// platformsOf returns the platforms that a machine of an architecture builds,
// its own first. They are fixed: what a machine's kernel happens to emulate
// besides must not change where a build runs. Nil for an unknown architecture.
func platformsOf(arch string) []string {
	switch arch {
	case "amd64":
		return []string{"linux/amd64", "linux/amd64/v2", "linux/amd64/v3", "linux/386"}
	case "arm64":
		return []string{"linux/arm64", "linux/arm/v7", "linux/arm/v6"}
	default:
		return nil
	}
}

// builds reports whether machines of arch build p.
func builds(arch string, p ocispecs.Platform) bool {
	return slices.ContainsFunc(platformsOf(arch), func(own string) bool {
		parsed, err := platforms.Parse(own)
		return err == nil && platforms.OnlyStrict(parsed).Match(platforms.Normalize(p))
	})
}

// article puts a or an before an architecture's name.
func article(arch string) string {
	if strings.HasPrefix(arch, "a") {
		return "an " + arch
	}
	return "a " + arch
}

// platformList formats platforms for messages.
func platformList(ps []ocispecs.Platform) string {
	names := make([]string, len(ps))
	for i, p := range ps {
		names[i] = platforms.Format(p)
	}
	return strings.Join(names, ", ")
}

// clientFirst orders architectures so that the client's own comes first: node
// 0 serves a build without --platform. Otherwise the server's order stays.
func clientFirst(archs []string) {
	slices.SortStableFunc(archs, func(a, b string) int {
		switch runtime.GOARCH {
		case a:
			return -1
		case b:
			return 1
		default:
			return 0
		}
	})
}

// share returns those of the wanted platforms that arch builds; all that it
// builds if none are named.
func share(arch string, wanted []string) ([]string, error) {
	if len(wanted) == 0 {
		return platformsOf(arch), nil
	}
	var out []string
	for _, w := range wanted {
		p, err := platforms.Parse(w)
		if err != nil {
			return nil, fmt.Errorf("platform %q is not valid: %w", w, err)
		}
		if builds(arch, p) {
			out = append(out, platforms.Format(platforms.Normalize(p)))
		}
	}
	return out, nil
}
