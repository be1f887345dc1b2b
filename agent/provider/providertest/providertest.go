// Package providertest holds the conformance suites of the provider seam: one
// for provider.Provider and one for provider.VolumeStore. Every implementation
// runs them against the real thing; a sentence of package provider that no
// suite checks is a gap here.
//
// The suites need root where the implementation does, end what they started,
// and ask the implementation at the end what is left on the host.
package providertest

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

// Ids as the control plane makes them: a kind and a UUIDv7.
const (
	volumeA     = "volume_0190f1c2a3b47c5d8e9f0a1b2c3d4e01"
	volumeB     = "volume_0190f1c2a3b47c5d8e9f0a1b2c3d4e02"
	volumeC     = "volume_0190f1c2a3b47c5d8e9f0a1b2c3d4e03"
	machineA    = "machine_0190f1c2a3b47c5d8e9f0a1b2c3d4e11"
	machineB    = "machine_0190f1c2a3b47c5d8e9f0a1b2c3d4e12"
	generationA = "generation_0190f1c2a3b47c5d8e9f0a1b2c3d4e21"
	generationB = "generation_0190f1c2a3b47c5d8e9f0a1b2c3d4e22"
	generationC = "generation_0190f1c2a3b47c5d8e9f0a1b2c3d4e23"
)

// hostileIDs are what must never reach a path, a command line or a rule.
func hostileIDs() map[string]string {
	return map[string]string{
		"empty":      "",
		"dot":        ".",
		"parent":     "..",
		"escape":     "../" + volumeA,
		"absolute":   "/etc/passwd",
		"nested":     volumeA + "/live",
		"option":     "--help",
		"space":      volumeA + " x",
		"newline":    volumeA + "\n",
		"nul":        volumeA + "\x00",
		"quote":      `volume_"; drop`,
		"upper case": strings.ToUpper(volumeA),
		"unicode":    "volume_０190f1c2a3b47c5d8e9f0a1b2c3d4e0",
		"long":       "volume_" + strings.Repeat("0", 5000),
	}
}

// labels that a careless encoding would change.
func labels() map[string]string {
	return map[string]string{
		"depot.project": "project_0190f1c2a3b47c5d8e9f0a1b2c3d4e31",
		"empty":         "",
		"text":          "a=b, \"c\"\n\t<ü&>",
	}
}

// eventually asks until done answers true, and fails the test after a minute.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for !done() {
		select {
		case <-again.C:
		case <-ctx.Done():
			t.Fatalf("still not so after a minute: %s", what)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t *testing.T, act string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got error %v, want %v", act, err, want)
	}
}
