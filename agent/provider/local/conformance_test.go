package local

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/opendepot/depot/agent/provider/btrfs"
	"github.com/opendepot/depot/agent/provider/providertest"
)

func TestConformance(t *testing.T) {
	providertest.RunProvider(t, providertest.Harness{
		Arch: "amd64",
		Open: func(t *testing.T, dir, pid1 string) providertest.Machines {
			t.Helper()
			store, err := btrfs.Open(t.Context(), btrfs.Config{Dir: filepath.Join(dir, "volumes"), PoolBytes: 1 << 30})
			must(t, err)
			bin := filepath.Join(dir, "bin")
			if !exists(bin) {
				builtPrograms(t, bin)
				must(t, os.Symlink(pid1, filepath.Join(bin, "depot-agent")))
			}
			p, err := Open(t.Context(), Config{
				State: filepath.Join(dir, "state"), Run: filepath.Join(dir, "run"), Binaries: bin,
				OpenVolume: Volumes(store.Open), Advertise: hostAddr, FirstPort: 41000, LastPort: 41099,
				Nameservers: []netip.Addr{netip.MustParseAddr(serverAddr)}, Log: slog.New(slog.DiscardHandler),
			})
			must(t, err)
			return providertest.Machines{
				Provider: p, Volumes: store,
				Close: func() error { return errors.Join(p.Close(context.WithoutCancel(t.Context())), store.Close()) },
			}
		},
		Leftovers: func(t *testing.T, dir string) []string {
			t.Helper()
			return traces(t, filepath.Join(dir, "state"), filepath.Join(dir, "run"))
		},
	})
}
