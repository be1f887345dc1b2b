package machine

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/opendepot/depot/internal/mtls"
)

// Config is machine.json: what a machine must know before it has registered.
// Nothing of it is secret; the join token lies beside it in a file of its own.
type Config struct {
	// MachineID is the control plane's id of this machine.
	MachineID string `json:"machine_id"`
	// ServerID is the control plane's id. Answers of any other are refused. If
	// empty, the first answer's becomes it.
	ServerID string `json:"server_id,omitempty"`
	// Arch is the architecture as Go names it, for messages.
	Arch string `json:"arch"`
	// ControlPlane says how to recognize the control plane behind the relay.
	ControlPlane ControlPlane `json:"control_plane"`
	// CNIPoolSize is how many network namespaces buildkitd keeps ready for RUN
	// steps; 0 means 4.
	CNIPoolSize int `json:"cni_pool_size,omitempty"`

	// Paths and Times are for images with another layout, and for tests; their
	// zero values mean what doc.go and design.md say.
	Paths Paths `json:"paths,omitzero"`
	Times Times `json:"times,omitzero"`
}

// ControlPlane says which server to accept at the other end of the relay.
type ControlPlane struct {
	// URL is the server's https://host[:port] as its listener for machines
	// calls itself. Nothing is dialled but the relay: the host is the name that
	// the certificate must carry where there is no pin.
	URL string `json:"url"`
	// Pin is the server's pin, if it has a certificate of its own making.
	Pin string `json:"pin,omitempty"`
}

// Paths of a machine.
type Paths struct {
	// Run holds join-token, relay/ and state/; empty means /run/depot.
	Run string `json:"run,omitempty"`
	// Root is buildkitd's root; empty means /var/lib/buildkit.
	Root string `json:"root,omitempty"`
	// Work is for buildkitd's socket and configuration file; empty means
	// /run/buildkit.
	Work string `json:"work,omitempty"`
	// Buildkitd and Runc are looked up on PATH unless they hold a slash; empty
	// means buildkitd and buildkit-runc.
	Buildkitd string `json:"buildkitd,omitempty"`
	Runc      string `json:"runc,omitempty"`
	// CNIConfig is the list that RUN steps get their network from; empty means
	// /etc/buildkit/cni.conflist. "host" gives them the machine's network.
	CNIConfig string `json:"cni_config,omitempty"`
	// CNIBinaries is where its plugins are; empty means /opt/cni/bin.
	CNIBinaries string `json:"cni_binaries,omitempty"`
	// Cgroup is the root of the machine's cgroup hierarchy; empty means
	// /sys/fs/cgroup.
	Cgroup string `json:"cgroup,omitempty"`
}

// Times of a machine, in nanoseconds in JSON; 0 means the default.
type Times struct {
	// Register bounds the registration; 2 min.
	Register time.Duration `json:"register,omitempty"`
	// Ready bounds the time from buildkitd's start to its first answer; 60 s.
	Ready time.Duration `json:"ready,omitempty"`
	// Stop bounds the time from buildkitd's TERM to its end; 30 s.
	Stop time.Duration `json:"stop,omitempty"`
	// CutOff is how long a machine without a connection waits for a control
	// plane that does not answer, before it drains; 1 h.
	CutOff time.Duration `json:"cut_off,omitempty"`
}

// LoadConfig reads machine.json. An unknown or impossible value is an error
// that names it.
func LoadConfig(path string) (Config, error) {
	data, err := os.ReadFile(path) //nolint:gosec // the path is the administrator's
	if err != nil {
		return Config{}, fmt.Errorf("read machine configuration: %w", err)
	}
	var c Config
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return Config{}, fmt.Errorf("read machine configuration %s: %w", path, err)
	}
	if err := c.Validate(); err != nil {
		return Config{}, fmt.Errorf("machine configuration %s: %w", path, err)
	}
	return c, nil
}

// Validate reports the first value that cannot be.
func (c Config) Validate() error {
	switch {
	case c.MachineID == "":
		return errors.New("machine_id is missing")
	case !slices.Contains([]string{"amd64", "arm64"}, c.Arch):
		return fmt.Errorf("arch %q is not known: use amd64 or arm64", c.Arch)
	case c.ControlPlane.URL == "":
		return errors.New("control_plane.url is missing: use the control plane's https URL for machines")
	case c.ControlPlane.Pin != "" && !mtls.ValidPin(c.ControlPlane.Pin):
		return fmt.Errorf("control_plane.pin %q is not a pin: use the one that the control plane prints at its start", c.ControlPlane.Pin)
	case c.CNIPoolSize < 0:
		return fmt.Errorf("cni_pool_size %d is negative", c.CNIPoolSize)
	}
	return nil
}

// withDefaults fills in what is zero.
func (c Config) withDefaults() Config {
	c.CNIPoolSize = cmp.Or(c.CNIPoolSize, 4)
	p, t := &c.Paths, &c.Times
	p.Run = cmp.Or(p.Run, "/run/depot")
	p.Root = cmp.Or(p.Root, "/var/lib/buildkit")
	p.Work = cmp.Or(p.Work, "/run/buildkit")
	p.Buildkitd = cmp.Or(p.Buildkitd, "buildkitd")
	p.Runc = cmp.Or(p.Runc, "buildkit-runc")
	p.CNIConfig = cmp.Or(p.CNIConfig, "/etc/buildkit/cni.conflist")
	p.CNIBinaries = cmp.Or(p.CNIBinaries, "/opt/cni/bin")
	p.Cgroup = cmp.Or(p.Cgroup, "/sys/fs/cgroup")
	t.Register = cmp.Or(t.Register, 2*time.Minute)
	t.Ready = cmp.Or(t.Ready, time.Minute)
	t.Stop = cmp.Or(t.Stop, 30*time.Second)
	t.CutOff = cmp.Or(t.CutOff, time.Hour)
	return c
}

func (p Paths) joinToken() string { return filepath.Join(p.Run, "join-token") }
func (p Paths) relay() string     { return filepath.Join(p.Run, "relay", "controlplane.sock") }
func (p Paths) exit() string      { return filepath.Join(p.Run, "state", "exit.json") }
func (p Paths) socket() string    { return filepath.Join(p.Work, "buildkitd.sock") }
func (p Paths) settings() string  { return filepath.Join(p.Work, "buildkitd.toml") }
