package main

import (
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/opendepot/depot/controlplane"
)

// config is all that `depot-controlplane serve` can be told. Each field is a
// flag, and an environment variable DEPOT_CONTROLPLANE_<FLAG> that the flag
// overrides. Secrets stand in files only.
type config struct {
	// DataDir holds the database; 0700.
	DataDir string
	// MasterKeyFile holds the key that seals all other keys, outside DataDir,
	// 0600; made at the first start. Empty: DataDir with "-master.key" added.
	MasterKeyFile string
	// ClientListen, AgentListen and OpsListen are host:port of the listeners
	// for clients, for agents and machines, and for health and metrics (which
	// speaks plain HTTP and has to be on loopback).
	ClientListen string
	AgentListen  string
	OpsListen    string
	// AdminTokenFile gets the first administrator's token at the first start,
	// 0600. Empty: admin-token in DataDir.
	AdminTokenFile string
	// TLSCert and TLSKey are PEM files for the listener for clients; empty: a
	// certificate of the control plane's own authority, known by its pin.
	TLSCert string
	TLSKey  string
	// Names are further DNS names and addresses in the control plane's own
	// certificate, for clients that verify names instead of the pin.
	Names []string
	// Organization is the first organization's name.
	Organization string
	// Times are durations of the protocol that differ from the defaults, as
	// name=duration; names are those of [timeNames].
	Times []string
	// LogFormat is text or json; LogLevel is debug, info, warn or error.
	LogFormat string
	LogLevel  string
}

func (c *config) dataFlags(f *pflag.FlagSet) {
	f.StringVar(&c.DataDir, "data-dir", "/var/lib/depot/controlplane", "directory of the database")
	f.StringVar(&c.MasterKeyFile, "master-key-file", "", "file of the master key, outside the data directory (default <data-dir>-master.key)")
}

func (c *config) flags(f *pflag.FlagSet) {
	c.dataFlags(f)
	f.StringVar(&c.ClientListen, "client-listen", "127.0.0.1:8443", "host:port of the listener for clients")
	f.StringVar(&c.AgentListen, "agent-listen", "127.0.0.1:8444", "host:port of the listener for agents and machines")
	f.StringVar(&c.OpsListen, "ops-listen", "127.0.0.1:8445", "loopback host:port of /healthz, /readyz and /metrics")
	f.StringVar(&c.AdminTokenFile, "admin-token-file", "", "where the first start writes the administrator's token (default <data-dir>/admin-token)")
	f.StringVar(&c.TLSCert, "tls-cert", "", "PEM certificate chain for clients (default: self-made, pinned by tokens)")
	f.StringVar(&c.TLSKey, "tls-key", "", "PEM key of --tls-cert")
	f.StringSliceVar(&c.Names, "name", nil, "further DNS names or addresses for the self-made certificate")
	f.StringVar(&c.Organization, "organization", "default", "name of the organization that the first start makes")
	f.StringArrayVar(&c.Times, "time", nil, "name=duration, to change one of: "+strings.Join(slices.Sorted(maps.Keys(timeNames(new(controlplane.Times)))), ", "))
	f.StringVar(&c.LogFormat, "log-format", "text", "text or json")
	f.StringVar(&c.LogLevel, "log-level", "info", "debug, info, warn or error")
}

// environment gives flags that were not set their values from the environment.
func environment(f *pflag.FlagSet, lookup func(string) (string, bool)) error {
	var err error
	f.VisitAll(func(flag *pflag.Flag) {
		name := "DEPOT_CONTROLPLANE_" + strings.ToUpper(strings.ReplaceAll(flag.Name, "-", "_"))
		if v, ok := lookup(name); ok && !flag.Changed && err == nil {
			if e := f.Set(flag.Name, v); e != nil {
				err = fmt.Errorf("environment variable %s=%q: %w", name, v, e)
			}
		}
	})
	return err
}

// complete checks the configuration and fills in what depends on other fields.
func (c *config) complete() error {
	var err error
	if c.DataDir, err = filepath.Abs(c.DataDir); err != nil {
		return fmt.Errorf("--data-dir %q: %w", c.DataDir, err)
	}
	if c.MasterKeyFile == "" {
		c.MasterKeyFile = c.DataDir + "-master.key"
	}
	if c.AdminTokenFile == "" {
		c.AdminTokenFile = filepath.Join(c.DataDir, "admin-token")
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		return fmt.Errorf("--tls-cert and --tls-key go together: give both or none")
	}
	if c.TLSCert != "" {
		// Read again when the listener is made: here, nothing is stored yet.
		if _, err := fileCertificate(c.TLSCert, c.TLSKey); err != nil {
			return err
		}
	}
	if err := (controlplane.Organization{Name: c.Organization}).Validate(); err != nil {
		return fmt.Errorf("--organization: %w", err)
	}
	for flag, addr := range map[string]string{"client-listen": c.ClientListen, "agent-listen": c.AgentListen, "ops-listen": c.OpsListen} {
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return fmt.Errorf("--%s %q: %w: use host:port", flag, addr, err)
		}
	}
	host, _, _ := net.SplitHostPort(c.OpsListen)
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return fmt.Errorf("--ops-listen %q is not on loopback: health and metrics are served without TLS, use 127.0.0.1 or ::1", c.OpsListen)
	}
	if !slices.Contains([]string{"text", "json"}, c.LogFormat) {
		return fmt.Errorf("--log-format %q is not known: use text or json", c.LogFormat)
	}
	return nil
}

// timeNames maps the names that --time takes to the durations of t.
func timeNames(t *controlplane.Times) map[string]*time.Duration {
	return map[string]*time.Duration{
		"lease-ttl":           &t.LeaseTTL,
		"lease-renew":         &t.LeaseRenew,
		"wait-ttl":            &t.WaitTTL,
		"connect-ttl":         &t.ConnectTTL,
		"quiet-ttl":           &t.QuietTTL,
		"launch":              &t.Launch,
		"register":            &t.Register,
		"drain":               &t.Drain,
		"agent-silent":        &t.AgentSilent,
		"keep-ended":          &t.KeepEnded,
		"client-certificate":  &t.ClientCertificate,
		"machine-certificate": &t.MachineCertificate,
	}
}

// times returns the durations of the protocol.
func (c *config) times() (controlplane.Times, error) {
	t := controlplane.DefaultTimes()
	names := timeNames(&t)
	for _, spec := range c.Times {
		name, value, _ := strings.Cut(spec, "=")
		d, ok := names[name]
		if !ok {
			return t, fmt.Errorf("--time %q: %q is not known: use one of %s", spec, name, strings.Join(slices.Sorted(maps.Keys(names)), ", "))
		}
		var err error
		if *d, err = time.ParseDuration(value); err != nil || *d <= 0 {
			return t, fmt.Errorf("--time %q: %q is not a positive duration: use one such as 90s", spec, value)
		}
	}
	if t.LeaseRenew >= t.LeaseTTL {
		return t, fmt.Errorf("--time lease-renew (%s) has to be shorter than lease-ttl (%s)", t.LeaseRenew, t.LeaseTTL)
	}
	if t.KeepEnded < t.MachineCertificate || t.KeepEnded < t.ClientCertificate {
		return t, fmt.Errorf("--time keep-ended (%s) has to be longer than certificates live: a machine is told of ended leases while theirs are valid", t.KeepEnded)
	}
	return t, nil
}

func (c *config) logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return nil, fmt.Errorf("--log-level %q is not known: use debug, info, warn or error", c.LogLevel)
	}
	opts := &slog.HandlerOptions{Level: level}
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, opts)), nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, opts)), nil
}
