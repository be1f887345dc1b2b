package local

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Config says where machines live on this host, and how they reach the world.
type Config struct {
	// State is a directory on a disk: records of machines, their logs, and root
	// filesystems. One provider at a time uses it.
	State string
	// Run is a directory in memory that a reboot empties, such as /run/depot. A
	// tmpfs is mounted there if there is none.
	Run string
	// Binaries is a directory with depot-agent, buildkitd, buildkit-runc and the
	// CNI plugins bridge, loopback and host-local.
	Binaries string
	// OpenVolume opens a volume for one machine to write; see [Volumes].
	OpenVolume OpenVolume
	// Advertise is the address or name by which clients reach this host.
	Advertise string
	// Listen is the address to listen on. Empty: Advertise if that is an address,
	// else all addresses.
	Listen string
	// FirstPort and LastPort bound the ports of machines, both included.
	FirstPort, LastPort uint16
	// Network is where machines get their /24 from; it must not overlap with any
	// route of the host. Zero: 10.213.0.0/16, which is room for 256 machines.
	Network netip.Prefix
	// Allow opens addresses that are dropped otherwise, a registry on this host,
	// say.
	Allow []Allow
	// Deny are more addresses to drop: the control plane's.
	Deny []netip.Prefix
	// Relay is a directory that machines see as /run/depot/relay, where the cloud
	// agent keeps the socket that leads to the control plane. Empty: none.
	Relay string
	// Nameservers are what machines ask for names. Empty: those of the host's
	// resolv.conf that can be reached from a machine.
	Nameservers []netip.Addr
	// Authorities is a file with certificates, in PEM, that machines trust beside
	// the host's: those of a registry of one's own, say. Empty: none.
	Authorities string
	// Runc is the path of runc. Empty: found on PATH.
	Runc string
	// Log must be set.
	Log *slog.Logger
}

// OpenVolume locks a volume for a machine, with the writer epoch as the fence;
// it returns provider.ErrVolumeBusy and provider.ErrStaleWriter as they are.
type OpenVolume func(ctx context.Context, volume, machine string, writerEpoch uint64) (Writer, error)

// Writer is a volume that is open for one machine.
type Writer interface {
	// Path is the live tree.
	Path() string
	// LockFile is the descriptor whose lock keeps other machines away.
	LockFile() *os.File
	// Close closes this process's copy of the descriptor. The lock must last as
	// long as the machine's copy is open, so it must not be unlocked explicitly.
	Close() error
}

// Volumes makes an OpenVolume from a store whose Open returns a type of its own.
func Volumes[W Writer](open func(ctx context.Context, volume, machine string, writerEpoch uint64) (W, error)) OpenVolume {
	return func(ctx context.Context, volume, machine string, writerEpoch uint64) (Writer, error) {
		w, err := open(ctx, volume, machine, writerEpoch)
		if err != nil {
			return nil, err // a typed nil would not compare as nil
		}
		return w, nil
	}
}

// Allow opens one destination to machines.
type Allow struct {
	// Prefix is where to; IPv4, because machines have nothing else.
	Prefix netip.Prefix
	// Port is the TCP and UDP port; 0 means every port and protocol.
	Port uint16
}

// ParseAllow reads "address", "address:port" or "address/bits".
func ParseAllow(s string) (Allow, error) {
	var a Allow
	host, port, hasPort := strings.Cut(s, ":")
	if hasPort {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return Allow{}, fmt.Errorf("allow %q: want address, address:port or address/bits, all IPv4", s)
		}
		a.Port = uint16(n)
	}
	prefix, err := netip.ParsePrefix(host)
	if err != nil {
		addr, addrErr := netip.ParseAddr(host)
		if addrErr != nil || !addr.Is4() {
			return Allow{}, fmt.Errorf("allow %q: want address, address:port or address/bits, all IPv4", s)
		}
		prefix = netip.PrefixFrom(addr, addr.BitLen())
	}
	if prefix.Addr().IsLoopback() {
		return Allow{}, fmt.Errorf("allow %q: a machine cannot reach the host's loopback: let the service listen on an address of the host and allow that", s)
	}
	a.Prefix = prefix.Masked()
	return a, nil
}

// defaults fills what is empty and refuses what cannot work.
func (c Config) defaults() (Config, error) {
	if !c.Network.IsValid() {
		c.Network = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 213, 0, 0}), 16)
	}
	c.Network = c.Network.Masked()
	var errs []error
	for name, dir := range map[string]*string{"state": &c.State, "run": &c.Run, "binaries": &c.Binaries} {
		abs, err := filepath.Abs(*dir)
		if *dir == "" || err != nil {
			errs = append(errs, fmt.Errorf("no %s directory is set", name))
		}
		*dir = abs
	}
	if c.Advertise == "" {
		errs = append(errs, errors.New("no advertised address is set: name the address at which clients reach this host"))
	}
	if c.Listen == "" {
		if addr, err := netip.ParseAddr(c.Advertise); err == nil {
			c.Listen = addr.String()
		}
	}
	if c.FirstPort == 0 || c.LastPort < c.FirstPort {
		errs = append(errs, fmt.Errorf("port range %d-%d: want first and last port, in order", c.FirstPort, c.LastPort))
	}
	if !c.Network.Addr().Is4() || c.Network.Bits() > machineBits || c.Network.Bits() < 8 {
		errs = append(errs, fmt.Errorf("network %s: want an IPv4 network from /8 to /%d", c.Network, machineBits))
	}
	if c.OpenVolume == nil || c.Log == nil {
		errs = append(errs, errors.New("volumes and log must be set"))
	}
	return c, errors.Join(errs...)
}
