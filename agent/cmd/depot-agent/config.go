package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	"github.com/opendepot/depot/agent/provider/local"
	"github.com/opendepot/depot/controlplane/client"
)

// cloudConfig is the configuration of `depot-agent cloud`.
type cloudConfig struct {
	// server is the control plane's listener for machines and agents; mandatory.
	server string
	// token joins the control plane; from the environment only.
	token string
	// tokenFile holds the token instead; empty means none.
	tokenFile string
	// stateDir is on a disk: identity, records of machines, volumes.
	stateDir string
	// runDir is in memory: machines' run-time state, and the relay.
	runDir string
	// name is the host's, for listings; empty means its host name.
	name string
	// advertise is where clients reach this host; empty means the address that
	// this host has towards the control plane.
	advertise string
	// listen is the address that machines listen on; empty means the advertised
	// one, if this host has it.
	listen string
	// portRange is first-last, both included.
	portRange string
	// pools are declared as in parsePool; empty means one, for this host's own
	// architecture.
	pools []string
	// binDir holds depot-agent, buildkitd, buildkit-runc and the CNI plugins;
	// empty means where this program is.
	binDir string
	// runc is the path of the host's runc; empty means the one on PATH.
	runc string
	// poolSize is the most that all volumes take, where they lie in a sparse
	// file; empty means nine tenths of what is free.
	poolSize string
	// network is where machines get their addresses from; empty means the
	// provider's choice.
	network string
	// allow are destinations that machines may reach although they are the
	// host's, or private to it.
	allow []string
	// authorities is a file with certificates that machines trust beside the
	// host's; empty means none.
	authorities string
	// dns are the name servers of machines; empty means the host's.
	dns []string
	// health is the loopback address of /healthz, /readyz and /metrics; empty
	// means none.
	health string
	// logFormat is text or json; logLevel debug, info, warn or error.
	logFormat, logLevel string
}

func (c *cloudConfig) bind(f *pflag.FlagSet) {
	f.StringVar(&c.server, "server", "", "the control plane's listener for agents: https://host:port")
	f.StringVar(&c.tokenFile, "token-file", "", "a file with the agent's token, for the first start (or DEPOT_AGENT_TOKEN)")
	f.StringVar(&c.stateDir, "state-dir", "/var/lib/depot/agent", "where identity, records and volumes are kept")
	f.StringVar(&c.runDir, "run-dir", "/run/depot", "where run-time state is kept, in memory")
	f.StringVar(&c.name, "name", "", "this host's name in listings (default: its host name)")
	f.StringVar(&c.advertise, "advertise-address", "", "the address or name by which clients reach this host (default: its address towards the control plane)")
	f.StringVar(&c.listen, "listen-address", "", "the address that machines listen on (default: the advertised one)")
	f.StringVar(&c.portRange, "port-range", "24000-24255", "the ports that machines listen on, one each")
	f.StringArrayVar(&c.pools, "pool", nil, "a pool: arch=amd64|arm64[,name=NAME][,max=MACHINES][,emulated]; may be repeated (default: one for this host's architecture)")
	f.StringVar(&c.binDir, "bin-dir", "", "where depot-agent, buildkitd, buildkit-runc and the CNI plugins are (default: where this program is)")
	f.StringVar(&c.runc, "runc", "", "the host's runc (default: the one on PATH)")
	f.StringVar(&c.poolSize, "pool-size", "", "the most that all volumes take, such as 200GiB (default: nine tenths of the free space)")
	f.StringVar(&c.network, "network", "", "the IPv4 network that machines get addresses from (default: 10.213.0.0/16)")
	f.StringArrayVar(&c.allow, "allow", nil, "an address, address:port or network that machines may reach although it is dropped otherwise; may be repeated")
	f.StringVar(&c.authorities, "ca-file", "", "certificates, in PEM, that machines trust beside the host's: of a registry of your own, say")
	f.StringArrayVar(&c.dns, "dns", nil, "a name server for machines; may be repeated (default: the host's)")
	f.StringVar(&c.health, "health-address", "127.0.0.1:9465", "the loopback address of /healthz, /readyz and /metrics; empty for none")
	f.StringVar(&c.logFormat, "log-format", "text", "text or json")
	f.StringVar(&c.logLevel, "log-level", "info", "debug, info, warn or error")
}

// settings are what a cloudConfig says, checked.
type settings struct {
	server              string // host:port
	token               client.Token
	name                string
	binDir              string
	firstPort, lastPort uint16
	pools               []poolConfig
	poolBytes           int64
	network             netip.Prefix
	allow               []local.Allow
	dns                 []netip.Addr
}

// check reads the values; its error names all that are wrong.
func (c *cloudConfig) check() (settings, error) {
	var s settings
	var errs []error
	fail := func(flag, value, want string) {
		errs = append(errs, fmt.Errorf("--%s %q: %s", flag, value, want))
	}
	if u, err := client.ParseURL(c.server); c.server == "" {
		errs = append(errs, errors.New("--server is missing: give the control plane's listener for agents, https://host:port"))
	} else if err != nil {
		errs = append(errs, fmt.Errorf("--server: %w", err))
	} else {
		s.server = net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "443"))
	}
	var err error
	if s.token, err = c.readToken(); err != nil {
		errs = append(errs, err)
	}
	for flag, dir := range map[string]string{"state-dir": c.stateDir, "run-dir": c.runDir} {
		if !filepath.IsAbs(dir) {
			fail(flag, dir, "give an absolute path")
		}
	}
	if c.stateDir == c.runDir {
		fail("run-dir", c.runDir, "it is the --state-dir too: give it a directory of its own, in memory")
	}
	if s.binDir, err = c.binaries(); err != nil {
		errs = append(errs, err)
	}
	if _, err := netip.ParseAddr(c.advertise); err != nil && strings.ContainsAny(c.advertise, ":/ ") {
		fail("advertise-address", c.advertise, "give an address or a name, without a port")
	}
	if s.name, err = hostName(c.name); err != nil {
		errs = append(errs, err)
	}
	var ok bool
	if s.firstPort, s.lastPort, ok = parsePorts(c.portRange); !ok {
		fail("port-range", c.portRange, "give the first and the last port, such as 24000-24255")
	}
	if s.pools, err = parsePools(c.pools, runtime.GOARCH, runtime.NumCPU()); err != nil {
		errs = append(errs, err)
	}
	if s.poolBytes, ok = parseBytes(c.poolSize); !ok {
		fail("pool-size", c.poolSize, "give a size such as 200GiB, of 1GiB or more")
	}
	errs = append(errs, c.checkNetwork(&s), checkHealth(c.health))
	return s, errors.Join(errs...)
}

// checkNetwork reads what machines have and may do on the network.
func (c *cloudConfig) checkNetwork(s *settings) (err error) {
	var errs []error
	if c.network != "" {
		if s.network, err = netip.ParsePrefix(c.network); err != nil || !s.network.Addr().Is4() {
			errs = append(errs, fmt.Errorf("--network %q: give an IPv4 network such as 10.213.0.0/16", c.network))
		}
	}
	for _, text := range c.allow {
		a, err := local.ParseAllow(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("--allow: %w", err))
		}
		s.allow = append(s.allow, a)
	}
	for _, text := range c.dns {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("--dns %q: give the address of a name server", text))
		}
		s.dns = append(s.dns, addr)
	}
	return errors.Join(errs...)
}

func (c *cloudConfig) readToken() (client.Token, error) {
	text, from := c.token, "DEPOT_AGENT_TOKEN"
	if c.tokenFile != "" {
		content, err := os.ReadFile(c.tokenFile)
		if err != nil {
			return client.Token{}, fmt.Errorf("--token-file: %w", err)
		}
		text, from = string(content), "--token-file "+c.tokenFile
	}
	if strings.TrimSpace(text) == "" {
		return client.Token{}, nil
	}
	t, err := client.ParseToken(text)
	if err != nil {
		return client.Token{}, fmt.Errorf("%s: %w", from, err)
	}
	return t, nil
}

func (c *cloudConfig) binaries() (string, error) {
	if c.binDir != "" {
		if _, err := os.Stat(filepath.Join(c.binDir, "buildkitd")); err != nil {
			return "", fmt.Errorf("--bin-dir %q: %w: give the directory that the programs were built into", c.binDir, err)
		}
		return c.binDir, nil
	}
	exe, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program's directory: %w; give --bin-dir", err)
	}
	if exe, err = filepath.EvalSymlinks(exe); err != nil {
		return "", fmt.Errorf("find this program's directory: %w; give --bin-dir", err)
	}
	return filepath.Dir(exe), nil
}

func hostName(given string) (string, error) {
	if given != "" {
		return given, nil
	}
	name, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("find this host's name: %w; give --name", err)
	}
	return name, nil
}

// parsePorts reads first-last.
func parsePorts(text string) (first, last uint16, ok bool) {
	a, b, _ := strings.Cut(text, "-")
	f, errF := strconv.ParseUint(a, 10, 16)
	l, errL := strconv.ParseUint(b, 10, 16)
	return uint16(f), uint16(l), errF == nil && errL == nil && f > 0 && f <= l
}

// parseBytes reads a size with a binary unit; empty is 0.
func parseBytes(text string) (int64, bool) {
	if text == "" {
		return 0, true
	}
	number := strings.TrimRight(text, "KMGTiB")
	shift, ok := map[string]int{"": 0, "B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}[text[len(number):]]
	n, err := strconv.ParseInt(number, 10, 64)
	if !ok || err != nil || n <= 0 || n > 1<<62>>shift || n<<shift < 1<<30 {
		return 0, false
	}
	return n << shift, true
}

// checkHealth refuses an address that others can reach.
func checkHealth(address string) error {
	if address == "" {
		return nil
	}
	at, err := netip.ParseAddrPort(address)
	if err != nil || !at.Addr().IsLoopback() {
		return fmt.Errorf("--health-address %q: give a loopback address and a port, such as 127.0.0.1:9465, or nothing", address)
	}
	return nil
}
