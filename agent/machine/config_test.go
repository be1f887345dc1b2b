package machine

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/buildkit/cmd/buildkitd/config"
	"github.com/pelletier/go-toml/v2"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

func TestLoadConfig(t *testing.T) {
	good := `{"machine_id": "mch_1", "server_id": "srv_1", "arch": "arm64", "control_plane": {"url": "https://x:1", "pin": "` + strings.Repeat("a", 52) + `"}}`
	for name, test := range map[string]struct{ in, want string }{
		"good":               {in: good},
		"not JSON":           {in: "machine_id = 1", want: "invalid character"},
		"unknown key":        {in: strings.Replace(good, `"arch"`, `"archh"`, 1), want: `unknown field "archh"`},
		"no machine":         {in: strings.Replace(good, "mch_1", "", 1), want: "machine_id is missing"},
		"unknown arch":       {in: strings.Replace(good, "arm64", "riscv", 1), want: `arch "riscv" is not known`},
		"no URL":             {in: strings.Replace(good, "https://x:1", "", 1), want: "control_plane.url is missing"},
		"a pin that is none": {in: strings.Replace(good, "aaa", "AAA", 1), want: "is not a pin"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "machine.json")
			if err := os.WriteFile(path, []byte(test.in), 0o600); err != nil {
				t.Fatal(err)
			}
			c, err := LoadConfig(path)
			if test.want == "" {
				if err != nil || c.MachineID != "mch_1" || c.ControlPlane.URL != "https://x:1" {
					t.Errorf("got %+v, %v", c, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v, want %q and the file's name", err, test.want)
			}
		})
	}
	if _, err := LoadConfig(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a missing file was read")
	}
}

// TestDaemonSettings reads the file with BuildKit's own types, strictly, so
// that a key that BuildKit renames fails here.
func TestDaemonSettings(t *testing.T) {
	cni := Config{}.withDefaults()
	host := cni
	host.Paths.CNIConfig = "host"
	for name, test := range map[string]struct {
		config   Config
		settings *depotv1.BuildkitSettings
		want     func(*config.Config)
	}{
		"all": {
			config: cni,
			settings: &depotv1.BuildkitSettings{
				Platforms: []string{"linux/arm64", "linux/arm/v7"}, CacheKeepSeconds: 7 * 24 * 3600, CacheBytes: 50 << 30,
				Entitlements: []string{"network.host"}, MaxParallelism: 8,
			},
			want: func(c *config.Config) {
				c.Entitlements = []string{"network.host"}
				c.Workers.OCI.Platforms = []string{"linux/arm64", "linux/arm/v7"}
				c.Workers.OCI.MaxParallelism = 8
				c.Workers.OCI.NetworkConfig = config.NetworkConfig{
					Mode: "cni", CNIConfigPath: "/etc/buildkit/cni.conflist", CNIBinaryPath: "/opt/cni/bin", CNIPoolSize: 4,
				}
				c.Workers.OCI.GCPolicy = []config.GCPolicy{
					{All: true, KeepDuration: config.Duration{Duration: 7 * 24 * time.Hour}},
					{All: true, MaxUsedSpace: config.DiskSpace{Bytes: 50 << 30}},
				}
			},
		},
		"bytes only, no entitlement": {
			config:   host,
			settings: &depotv1.BuildkitSettings{CacheBytes: 1},
			want: func(c *config.Config) {
				c.Workers.OCI.Mode = "host"
				c.Workers.OCI.GCPolicy = []config.GCPolicy{{All: true, MaxUsedSpace: config.DiskSpace{Bytes: 1}}}
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			data, err := daemonSettings(test.config, test.settings)
			if err != nil {
				t.Fatal(err)
			}
			yes, no, entries := true, false, int64(historyMaxEntries)
			want := config.Config{
				Root: "/var/lib/buildkit", Entitlements: []string{},
				GRPC:    config.GRPCConfig{Address: []string{"unix:///run/buildkit/buildkitd.sock"}},
				OTEL:    config.OTELConfig{SocketPath: "/run/buildkit/otel-grpc.sock"},
				CDI:     config.CDIConfig{Disabled: &yes},
				History: &config.HistoryConfig{MaxAge: config.Duration{Duration: historyMaxAge}, MaxEntries: &entries},
				Log:     config.LogConfig{Format: "text"},
			}
			want.Workers.OCI.Enabled, want.Workers.OCI.GC, want.Workers.Containerd.Enabled = &yes, &yes, &no
			want.Workers.OCI.Snapshotter, want.Workers.OCI.Binary = "overlayfs", "buildkit-runc"
			test.want(&want)
			var got config.Config
			if err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(&got); err != nil {
				t.Fatalf("%v\n%s", err, data)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s\n%s", diff, data)
			}
		})
	}
}

func TestSample(t *testing.T) {
	for name, test := range map[string]struct {
		files map[string]string
		want  *depotv1.Usage
	}{
		"version 2": {
			files: map[string]string{
				"cgroup.controllers": "cpu memory", "cpu.stat": "usage_usec 1500\nuser_usec 1000\n",
				"memory.current": "4096\n", "memory.max": "8192\n",
			},
			want: &depotv1.Usage{CpuNanoseconds: 1_500_000, MemoryBytes: 4096, MemoryLimitBytes: 8192},
		},
		"version 2, no limit": {
			files: map[string]string{"cgroup.controllers": "memory", "memory.current": "1\n", "memory.max": "max\n"},
			want:  &depotv1.Usage{MemoryBytes: 1},
		},
		"version 1": {
			files: map[string]string{
				"cpuacct/cpuacct.usage": "77\n", "memory/memory.usage_in_bytes": "4096\n", "memory/memory.limit_in_bytes": "8192\n",
			},
			want: &depotv1.Usage{CpuNanoseconds: 77, MemoryBytes: 4096, MemoryLimitBytes: 8192},
		},
		"version 1, no limit": {
			files: map[string]string{"memory/memory.limit_in_bytes": "9223372036854771712\n"},
			want:  &depotv1.Usage{},
		},
		"nothing": {want: &depotv1.Usage{}},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			for path, content := range test.files {
				if err := os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(root, path), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			now := time.Now()
			got, err := sample(Paths{Root: root, Cgroup: root}, now)
			if err != nil {
				t.Fatal(err)
			}
			if got.GetDiskUsedBytes() <= 0 || got.GetDiskFreeBytes() <= 0 || !got.GetAt().AsTime().Equal(now) {
				t.Errorf("disk or time is not measured: %v", got)
			}
			type numbers struct{ cpu, memory, limit int64 }
			if got, want := (numbers{got.GetCpuNanoseconds(), got.GetMemoryBytes(), got.GetMemoryLimitBytes()}),
				(numbers{test.want.GetCpuNanoseconds(), test.want.GetMemoryBytes(), test.want.GetMemoryLimitBytes()}); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
}

// TestSweep removes what containers that were killed left, and nothing else.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	p := Paths{Root: filepath.Join(dir, "root"), Cgroup: filepath.Join(dir, "cgroup")}
	executor := filepath.Join(p.Root, "runc-overlayfs", "executor")
	gone := []string{
		filepath.Join(executor, "a1", "rootfs"), filepath.Join(executor, "b2"),
		filepath.Join(p.Cgroup, "memory", "buildkit", "a1"), filepath.Join(p.Cgroup, "buildkit", "b2"),
	}
	stays := []string{
		filepath.Join(p.Root, "runc-overlayfs", "snapshots"), filepath.Join(executor, "runc-log.json"),
		filepath.Join(p.Cgroup, "memory", "buildkit", "busy", "child"), filepath.Join(p.Cgroup, "memory", "other"),
	}
	for _, path := range append(gone, stays...) {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if filepath.Ext(path) == ".json" {
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		} else if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := sweep(t.Context(), p, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	for _, path := range gone {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s is still there", path)
		}
	}
	for _, path := range stays {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	if err := sweep(t.Context(), Paths{Root: filepath.Join(dir, "none"), Cgroup: dir}, slog.New(slog.DiscardHandler)); err != nil {
		t.Errorf("where nothing is: %v", err)
	}
}

func TestDaemonEnv(t *testing.T) {
	got := daemonEnv([]string{"PATH=/bin", "LISTEN_FDS=1", "LISTEN_PID=1", "NOTIFY_SOCKET=/x", "HOME=/root"})
	if diff := cmp.Diff([]string{"PATH=/bin", "HOME=/root"}, got); diff != "" {
		t.Error(diff)
	}
}
