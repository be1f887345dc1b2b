package machine

import (
	"fmt"
	"path/filepath"
	"strconv"
	"time"

	"github.com/pelletier/go-toml/v2"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// The bounds of buildkitd's build history, which lives outside the cache's.
const (
	historyMaxAge     = 30 * 24 * time.Hour
	historyMaxEntries = 1000
)

// daemonFile is the part of buildkitd.toml that a machine sets. BuildKit's own
// type cannot be written: its sizes and durations have readers only, and its
// zero values would override the daemon's defaults. A test reads the file with
// BuildKit's reader, so that a renamed key does not go unnoticed.
type daemonFile struct {
	Root         string          `toml:"root"`
	Entitlements []string        `toml:"insecure-entitlements"`
	GRPC         daemonGRPC      `toml:"grpc"`
	OTEL         daemonOTEL      `toml:"otel"`
	CDI          daemonCDI       `toml:"cdi"`
	History      daemonHistory   `toml:"history"`
	Worker       daemonWorkers   `toml:"worker"`
	Log          daemonLogFormat `toml:"log"`
}

type daemonGRPC struct {
	Address []string `toml:"address"`
}

type daemonOTEL struct {
	SocketPath string `toml:"socketPath"`
}

type daemonCDI struct {
	Disabled bool `toml:"disabled"`
}

type daemonHistory struct {
	MaxAge     string `toml:"maxAge"`
	MaxEntries int64  `toml:"maxEntries"`
}

type daemonLogFormat struct {
	Format string `toml:"format"`
}

type daemonWorkers struct {
	OCI        daemonOCI        `toml:"oci"`
	Containerd daemonContainerd `toml:"containerd"`
}

type daemonContainerd struct {
	Enabled bool `toml:"enabled"`
}

type daemonOCI struct {
	Enabled        bool       `toml:"enabled"`
	Platforms      []string   `toml:"platforms,omitempty"`
	Snapshotter    string     `toml:"snapshotter"`
	Binary         string     `toml:"binary"`
	GC             bool       `toml:"gc"`
	GCPolicy       []daemonGC `toml:"gcpolicy"`
	NetworkMode    string     `toml:"networkMode"`
	CNIConfigPath  string     `toml:"cniConfigPath,omitempty"`
	CNIBinaryPath  string     `toml:"cniBinaryPath,omitempty"`
	CNIPoolSize    int        `toml:"cniPoolSize,omitempty"`
	MaxParallelism int32      `toml:"max-parallelism,omitempty"`
}

type daemonGC struct {
	All          bool   `toml:"all"`
	KeepDuration string `toml:"keepDuration,omitempty"`
	MaxUsedSpace string `toml:"maxUsedSpace,omitempty"`
}

// daemonSettings returns buildkitd.toml for a project's settings. What grants
// anything (entitlements) comes from the settings alone.
func daemonSettings(c Config, s *depotv1.BuildkitSettings) ([]byte, error) {
	oci := daemonOCI{
		Enabled:        true,
		Platforms:      s.GetPlatforms(),
		Snapshotter:    "overlayfs",
		Binary:         c.Paths.Runc,
		GC:             true,
		GCPolicy:       gcPolicy(time.Duration(s.GetCacheKeepSeconds())*time.Second, s.GetCacheBytes()),
		NetworkMode:    "host",
		MaxParallelism: s.GetMaxParallelism(),
	}
	if c.Paths.CNIConfig != "host" {
		oci.NetworkMode = "cni"
		oci.CNIConfigPath = c.Paths.CNIConfig
		oci.CNIBinaryPath = c.Paths.CNIBinaries
		oci.CNIPoolSize = c.CNIPoolSize
	}
	entitlements := s.GetEntitlements()
	if entitlements == nil {
		entitlements = []string{} // written as an empty list: none
	}
	data, err := toml.Marshal(daemonFile{
		Root:         c.Paths.Root,
		Entitlements: entitlements,
		GRPC:         daemonGRPC{Address: []string{"unix://" + c.Paths.socket()}},
		OTEL:         daemonOTEL{SocketPath: filepath.Join(c.Paths.Work, "otel-grpc.sock")},
		CDI:          daemonCDI{Disabled: true},
		History:      daemonHistory{MaxAge: historyMaxAge.String(), MaxEntries: historyMaxEntries},
		Log:          daemonLogFormat{Format: "text"},
		Worker:       daemonWorkers{OCI: oci},
	})
	if err != nil {
		return nil, fmt.Errorf("write buildkitd's configuration: %w", err)
	}
	return data, nil
}

// gcPolicy keeps records that were used within keep, and the whole under
// maxBytes. All sizes are absolute: BuildKit's own rules count in percent of
// statfs, which does not show a quota, and minFreeSpace on a shared pool makes
// it prune everything. The last rule spares nothing, or the bound would be
// none.
func gcPolicy(keep time.Duration, maxBytes int64) []daemonGC {
	var rules []daemonGC
	if keep > 0 {
		rules = append(rules, daemonGC{All: true, KeepDuration: keep.String()})
	}
	if maxBytes > 0 {
		rules = append(rules, daemonGC{All: true, MaxUsedSpace: strconv.FormatInt(maxBytes, 10)})
	}
	return rules
}
