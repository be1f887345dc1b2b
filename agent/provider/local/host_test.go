package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/opendepot/depot/agent/provider"
	"github.com/opendepot/depot/agent/provider/btrfs"
)

// The tests' host is a network namespace of their own, with one uplink to
// another that stands for the world, so that firewall rules can be what they
// are elsewhere without changing this host's.
const (
	hostAddr      = "198.51.100.1"
	worldAddr     = "198.51.100.2"
	serverAddr    = "203.0.113.10" // some server of the internet's
	planeAddr     = "203.0.113.20" // the control plane
	metadataAddr  = "169.254.169.254"
	containerAddr = "192.0.2.2" // a container behind a bridge of the host's
)

const (
	machineA = "machine_0190f1c2a3b47c5d8e9f0a1b2c3d4e11"
	machineB = "machine_0190f1c2a3b47c5d8e9f0a1b2c3d4e12"
	volumeA  = "volume_0190f1c2a3b47c5d8e9f0a1b2c3d4e01"
	volumeB  = "volume_0190f1c2a3b47c5d8e9f0a1b2c3d4e02"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "agent" {
		agentToKill(os.Args[2])
		return
	}
	if err := isolate(m); err != nil {
		fmt.Fprintln(os.Stderr, "agent/provider/local:", err)
		syscall.Exit(1)
	}
}

// standin is where the stand-in for a machine agent is: beside the tests' own
// program, which `go test` makes and removes.
func standin(self string) string { return filepath.Join(filepath.Dir(self), "depot-agent-standin") }

// isolate runs the tests in a network namespace of their own, once it has built
// what they all need.
func isolate(m *testing.M) error {
	if os.Geteuid() != 0 {
		return errors.New("the tests of agent/provider/local make machines and need root: run them as root, or make test-unit for the rest")
	}
	mine, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return err
	}
	parent, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", os.Getppid()))
	if err != nil {
		return err
	}
	if mine != parent {
		stop, err := makeHost()
		if err != nil {
			return err
		}
		m.Run()
		return stop()
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	build := exec.Command("go", "build", "-o", standin(self), "./testdata/standin") //nolint:gosec,noctx // G204: the tests' own directory; it ends by itself
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the stand-in: %w: %s", err, out)
	}
	cmd := exec.Command(self, os.Args[1:]...) //nolint:gosec,noctx // G204, G702: this very program; it ends with this process
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // the death of the thread that starts it is what Pdeathsig waits for
	return cmd.Run()
}

// makeHost gives this namespace an uplink and the world its servers.
func makeHost() (stop func() error, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	host, err := netns.Get()
	if err != nil {
		return nil, err
	}
	world, err := netns.New() // this thread is in it now
	if err != nil {
		return nil, err
	}
	if err := configure("lo", serverAddr+"/32", planeAddr+"/32", metadataAddr+"/32"); err != nil {
		return nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "down0"
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "up0", PeerNamespace: netlink.NsFd(int(host))}); err != nil {
		return nil, err
	}
	if err := configure("down0", worldAddr+"/24"); err != nil {
		return nil, err
	}
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: linkNamed("inside0"), PeerName: "port0", PeerNamespace: netlink.NsFd(int(host))}); err != nil {
		return nil, err
	}
	if err := configure("inside0", containerAddr+"/24"); err != nil {
		return nil, err
	}
	var closers []io.Closer
	for _, addr := range []string{containerAddr + ":80", serverAddr + ":80", planeAddr + ":443", metadataAddr + ":80", worldAddr + ":80"} {
		c, err := echo(addr)
		if err != nil {
			return nil, err
		}
		closers = append(closers, c...)
	}
	if err := netns.Set(host); err != nil {
		return nil, err
	}
	if err := configure("lo", "127.0.0.1/8", "fd00:1::1/64"); err != nil {
		return nil, err
	}
	if err := configure("up0", hostAddr+"/24"); err != nil {
		return nil, err
	}
	if err := netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(worldAddr)}); err != nil {
		return nil, err
	}
	if err := bridge("docker0", "port0"); err != nil {
		return nil, err
	}
	for _, addr := range []string{":7000", hostAddr + ":5000"} {
		c, err := echo(addr)
		if err != nil {
			return nil, err
		}
		closers = append(closers, c...)
	}
	return func() error {
		var errs []error
		for _, c := range closers {
			errs = append(errs, c.Close())
		}
		return errors.Join(append(errs, world.Close(), host.Close())...)
	}, nil
}

func linkNamed(name string) netlink.LinkAttrs {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	return attrs
}

// bridge makes a bridge with one port, as dockerd does, and forwards for it.
func bridge(name, port string) error {
	b := &netlink.Bridge{LinkAttrs: linkNamed(name)}
	if err := netlink.LinkAdd(b); err != nil {
		return err
	}
	p, err := netlink.LinkByName(port)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetMaster(p, b); err != nil {
		return err
	}
	if err := configure(port); err != nil {
		return err
	}
	if err := configure(name, "192.0.2.1/24"); err != nil {
		return err
	}
	return sysctl("ipv4/conf/"+name+"/forwarding", "1")
}

// configure sets up a device of this thread's namespace.
func configure(name string, prefixes ...string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, p := range prefixes {
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix(p))}); err != nil && !errors.Is(err, syscall.EEXIST) {
			return fmt.Errorf("%s %s: %w", name, p, err)
		}
	}
	return nil
}

// echo answers on a TCP and a UDP port of this thread's namespace.
func echo(addr string) ([]io.Closer, error) {
	l, err := echoes("tcp", addr)
	if err != nil {
		return nil, err
	}
	u, err := new(net.ListenConfig).ListenPacket(context.Background(), "udp", addr)
	if err != nil {
		return nil, err
	}
	go func() {
		b := make([]byte, 1)
		for {
			_, from, err := u.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = u.WriteTo(b, from)
		}
	}()
	return []io.Closer{l, u}, nil
}

// echoes answers connections with the first byte that it got.
func echoes(network, addr string) (io.Closer, error) {
	l, err := new(net.ListenConfig).Listen(context.Background(), network, addr)
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.CopyN(c, c, 1)
				_ = c.Close()
			}()
		}
	}()
	return l, nil
}

// rig is a provider with what it needs, in directories of the test's own.
type rig struct {
	config Config
	store  *btrfs.Store
	*Provider
}

func newRig(t *testing.T) *rig {
	t.Helper()
	base, err := os.MkdirTemp("/tmp", "depot-local-") //nolint:usetesting // sockets below it have short names only
	must(t, err)
	r := &rig{}
	t.Cleanup(func() { must(t, os.RemoveAll(base)) })
	r.store, err = btrfs.Open(t.Context(), btrfs.Config{Dir: filepath.Join(base, "volumes"), PoolBytes: 1 << 30})
	must(t, err)
	t.Cleanup(func() { must(t, r.store.Close()) })
	for _, id := range []string{volumeA, volumeB} {
		_, err := r.store.Ensure(t.Context(), provider.VolumeSpec{ID: id})
		must(t, err)
	}
	must(t, os.Mkdir(filepath.Join(base, "relay"), 0o700))
	r.config = Config{
		State: filepath.Join(base, "state"), Run: filepath.Join(base, "run"), Binaries: binaries(t, filepath.Join(base, "bin")),
		OpenVolume: Volumes(r.store.Open), Advertise: hostAddr, FirstPort: 40000, LastPort: 40010,
		Deny: []netip.Prefix{netip.MustParsePrefix(planeAddr + "/32")}, Relay: filepath.Join(base, "relay"),
		Nameservers: []netip.Addr{netip.MustParseAddr(serverAddr)}, Log: slog.New(slog.DiscardHandler),
	}
	r.open(t)
	t.Cleanup(func() { r.end(t) })
	return r
}

func (r *rig) open(t *testing.T) {
	t.Helper()
	var err error
	r.Provider, err = Open(t.Context(), r.config)
	must(t, err)
}

func (r *rig) reopen(t *testing.T) {
	t.Helper()
	must(t, r.Close(t.Context()))
	r.open(t)
}

// end destroys what the test left, and looks for what that left.
func (r *rig) end(t *testing.T) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	ids, err := r.records.ids()
	must(t, err)
	for _, id := range ids {
		must(t, r.Destroy(ctx, id))
	}
	r.noTrace(t)
	must(t, r.Close(ctx))
	if mounts := contents(t, "/proc/self/mounts"); strings.Contains(mounts, r.config.Run) {
		t.Errorf("still mounted: %s", mounts)
	}
}

// noTrace fails if there is anything on the host but an empty provider.
func (r *rig) noTrace(t *testing.T) {
	t.Helper()
	if left := traces(t, r.config.State, r.config.Run); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
}

// traces lists what the provider of these directories keeps on the host for
// machines.
func traces(t *testing.T, state, run string) []string {
	t.Helper()
	key, err := keyOf(state)
	must(t, err)
	table, devices := "depot_"+key, "dp"+key+"-"
	var left []string
	for _, out := range []string{
		output(t, "ip", "-br", "link"),
		output(t, "ip", "route", "show", "table", "all"),
		output(t, "nft", "list", "tables"),
		output(t, "iptables", "-S"),
		strings.ReplaceAll(contents(t, "/proc/self/mounts"), "depot "+run+" ", ""), // the one for all machines
	} {
		for line := range strings.Lines(out) {
			if strings.Contains(line, table) || strings.Contains(line, devices) || strings.Contains(line, run) {
				left = append(left, strings.TrimSpace(line))
			}
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/" + table, "/sys/fs/cgroup/*/" + table, state + "/machines/*", state + "/forwarding.json", run + "/machines/*", run + "/runc/*"} {
		found, err := filepath.Glob(pattern)
		must(t, err)
		left = append(left, found...)
	}
	if forwarding := contents(t, "/proc/sys/net/ipv4/conf/up0/forwarding"); forwarding != "0\n" {
		left = append(left, "forwarding on the uplink")
	}
	for _, proc := range processes(t) {
		if !strings.Contains(contentsIfAny(proc+"/cgroup"), table) {
			continue
		}
		// One that has ended is there until its parent, the host's init, looks.
		pid, err := strconv.Atoi(filepath.Base(proc))
		must(t, err)
		if p, err := find(pid); err == nil && p.running() {
			left = append(left, "process "+strings.ReplaceAll(contentsIfAny(proc+"/cmdline"), "\x00", " "))
		}
	}
	return left
}

func processes(t *testing.T) []string {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*")
	must(t, err)
	return procs
}

func (r *rig) launch(t *testing.T, spec provider.MachineSpec) provider.Instance {
	t.Helper()
	i, err := r.Launch(t.Context(), spec)
	must(t, err)
	if i.State != provider.Running {
		t.Fatalf("launched, and is %s: %+v\n%s", i.State, i.Exit, contentsIfAny(r.records.log(spec.ID)))
	}
	return i
}

func (r *rig) instance(t *testing.T, id string) provider.Instance {
	t.Helper()
	list, err := r.List(t.Context())
	must(t, err)
	for _, i := range list {
		if i.ID == id {
			return i
		}
	}
	t.Fatalf("machine %s is not listed: %+v", id, list)
	return provider.Instance{}
}

// exited waits until the machine has ended.
func (r *rig) exited(t *testing.T, id string) provider.Exit {
	t.Helper()
	var i provider.Instance
	eventually(t, "machine has ended", func() bool {
		i = r.instance(t, id)
		return i.State == provider.Exited
	})
	return *i.Exit
}

// inside runs the stand-in's probe in the machine's own namespaces.
func (r *rig) inside(t *testing.T, id string, args ...string) string {
	t.Helper()
	return output(t, "runc", append([]string{"--root", r.runcDir(), "exec", id, agentPath}, args...)...)
}

// greeting is what the machine says at its door.
func greeting(t *testing.T, address string) string {
	t.Helper()
	var d net.Dialer
	c, err := d.DialContext(t.Context(), "tcp", address)
	must(t, err)
	defer func() { must(t, c.Close()) }()
	must(t, c.SetDeadline(time.Now().Add(10*time.Second)))
	b, err := io.ReadAll(c)
	must(t, err)
	return strings.TrimSpace(string(b))
}

// binaries makes a directory of programs with the stand-in in the machine
// agent's place.
func binaries(t *testing.T, dir string) string {
	t.Helper()
	builtPrograms(t, dir)
	self, err := os.Executable()
	must(t, err)
	must(t, os.Symlink(standin(self), filepath.Join(dir, "depot-agent")))
	return dir
}

// builtPrograms makes a directory of what `make build` built of upstream's.
func builtPrograms(t *testing.T, dir string) {
	t.Helper()
	must(t, os.Mkdir(dir, 0o700))
	built, err := filepath.Abs("../../../bin")
	must(t, err)
	for _, name := range []string{"buildkitd", "buildkit-runc", "bridge", "loopback", "host-local"} {
		if !exists(filepath.Join(built, name)) {
			t.Fatalf("%s is not in %s: run make build first", name, built)
		}
		must(t, os.Symlink(filepath.Join(built, name), filepath.Join(dir, name)))
	}
}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...) //nolint:gosec // G204: what the tests name
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

func contents(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path) //nolint:gosec // G304: what the tests name
	must(t, err)
	return string(b)
}

func contentsIfAny(path string) string {
	b, err := os.ReadFile(path) //nolint:gosec // G304: what the tests name
	if err != nil {
		return ""
	}
	return string(b)
}

// eventually asks until done answers true.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	late := time.After(time.Minute)
	for !done() {
		select {
		case <-again.C:
		case <-late:
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
