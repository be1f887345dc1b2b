package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/cgi" //nolint:gosec // G504: of Go before 1.6.3
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/opendepot/depot/e2e/site"
)

// The addresses of the machines in the test's network. Each lives in a
// namespace of its own behind a router, with IPv4 and IPv6.
const (
	clientAddr   = "10.77.1.2"
	planeAddr    = "10.77.2.2"
	hostAddr     = "10.77.3.2"
	internetAddr = "198.51.100.2"
	secondAddr   = "10.88.0.1"       // another one of the host
	linkAddr     = "169.254.7.7"     // another one of the host
	metadataAddr = "169.254.169.254" // behind the router
	metadata6    = "fd00:ec2::254"   // behind the router
	host6        = "fd77:3::2"
	plane6       = "fd77:2::2"
	internet6    = "fd77:4::2"
)

// network is a client, a control plane, a host and an "internet", joined by a
// router.
type network struct {
	client, plane, host, internet *site.Netns
	answered                      *tally
	// watched are the targets whose tries are counted.
	watched []string
}

func newNetwork(t *testing.T) *network {
	t.Helper()
	router := site.NewNetns(t)
	n := &network{
		client: site.NewNetns(t), plane: site.NewNetns(t), host: site.NewNetns(t), internet: site.NewNetns(t),
		answered: &tally{seen: map[string]int{}},
	}
	router.Run(t, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	for i, end := range []*site.Netns{n.client, n.plane, n.host, n.internet} {
		subnet, name := fmt.Sprintf("10.77.%d.", i+1), fmt.Sprintf("to%d", i+1)
		if end == n.internet {
			subnet = strings.TrimSuffix(internetAddr, "2")
		}
		router.Link(t, name, subnet+"1/24", end, "eth0", subnet+"2/24")
		end.IP(t, "route", "add", "default", "via", subnet+"1")
		subnet6 := fmt.Sprintf("fd77:%d::", i+1)
		router.IP(t, "addr", "add", subnet6+"1/64", "dev", name, "nodad")
		end.IP(t, "addr", "add", subnet6+"2/64", "dev", "eth0", "nodad")
		end.IP(t, "route", "add", "default", "via", subnet6+"1")
	}
	second := func(end *site.Netns, addrs ...string) {
		end.IP(t, "link", "add", "second0", "type", "bridge")
		end.IP(t, "link", "set", "second0", "up")
		for _, a := range addrs {
			end.IP(t, "addr", "add", a, "dev", "second0")
		}
	}
	second(n.host, secondAddr+"/32", linkAddr+"/32")
	second(n.internet, metadataAddr+"/32", metadata6+"/128")
	router.IP(t, "route", "add", metadataAddr, "via", internetAddr)
	router.IP(t, "route", "add", metadata6, "via", internet6)
	return n
}

// tally counts the connections that servers were asked for, by the address
// that they were asked at.
type tally struct {
	mu   sync.Mutex
	seen map[string]int // guarded by mu
}

func (a *tally) note(conn net.Conn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.seen[conn.LocalAddr().String()]++
}

// all returns the counts so far.
func (a *tally) all() map[string]int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.seen)
}

// serve answers HTTP in a namespace and notes each connection.
func (n *network) serve(t *testing.T, end *site.Netns, address string, handler http.Handler) {
	t.Helper()
	l, err := end.Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{ReadHeaderTimeout: time.Minute, Handler: handler, ConnState: func(c net.Conn, state http.ConnState) {
		if state == http.StateNew {
			n.answered.note(c)
		}
	}}
	var done sync.WaitGroup
	done.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() {
		_ = s.Close()
		done.Wait()
	})
}

func hello(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello\n") }

// engine runs a real Docker Engine in a namespace: its firewall drops what it
// does not know.
func engine(t *testing.T, end *site.Netns) {
	t.Helper()
	dir, deps := t.TempDir(), filepath.Join(site.Deps(t), "bin")
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() //nolint:errcheck // the engine has its own descriptor
	socket := filepath.Join(dir, "docker.sock")
	args := end.Enter(filepath.Join(deps, "dockerd"), "--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"),
		"--pidfile", filepath.Join(dir, "pid"), "--host", "unix://"+socket, "--storage-driver", "vfs")
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), args[0], args[1:]...) //nolint:gosec // the test's own arguments
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(site.Environ(), "PATH="+deps+":"+os.Getenv("PATH")) //nolint:forbidigo // a test has no main
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("dockerd:\n%s", read(t, log.Name()))
		}
	})
	site.Eventually(t, "the engine answers", func() bool {
		return exec.CommandContext(t.Context(), filepath.Join(deps, "docker"), "--host", "unix://"+socket, "version").Run() == nil //nolint:gosec // the test's own arguments
	})
	if rules := end.Run(t, "iptables", "-S"); !strings.Contains(rules, "-P FORWARD DROP") {
		t.Fatalf("the engine does not drop forwarded packets:\n%s", rules)
	}
}

// ufw sets up what ufw does, in short: drop what was not opened, and open what
// the operator of an agent opens.
func ufw(t *testing.T, end *site.Netns) {
	t.Helper()
	end.Run(t, "ip6tables", "-A", "INPUT", "-p", "ipv6-icmp", "-j", "ACCEPT")
	for _, prog := range []string{"iptables", "ip6tables"} {
		for _, rule := range []string{
			"-A INPUT -i lo -j ACCEPT", "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
			"-A INPUT -p tcp --dport 24000:24255 -j ACCEPT", "-A INPUT ! -i dp+ -p tcp --dport 7000:7100 -j ACCEPT",
			"-P INPUT DROP", "-P FORWARD DROP",
		} {
			end.Run(t, append([]string{prog, "-w", "5"}, strings.Fields(rule)...)...)
		}
	}
}

// TestNetworkBesideDocker and the next one build on a host whose firewall
// drops what it forwards, reach the internet by every way that a build has,
// and by none what a machine is kept from.
func TestNetworkBesideDocker(t *testing.T) {
	t.Parallel()
	testNetwork(t, engine)
}

func TestNetworkBesideUFW(t *testing.T) {
	t.Parallel()
	testNetwork(t, ufw)
}

func testNetwork(t *testing.T, firewall func(*testing.T, *site.Netns)) {
	t.Helper()
	n := newNetwork(t)
	firewall(t, n.host)
	before := hostState(t, n.host)
	t.Cleanup(func() { // after the host's removal
		if diff := cmp.Diff(before, hostState(t, n.host)); diff != "" {
			t.Errorf("left of the machines' network (-before +after):\n%s", diff)
		}
	})
	s := site.New(t, site.Config{ControlPlaneNet: n.plane, HostNet: n.host, ClientNet: n.client, ControlPlaneAddress: planeAddr})
	h := s.AddHost(t, site.HostConfig{Address: hostAddr, Pools: []string{"arch=" + site.NativeArch() + ",max=8"}, Flags: []string{"--allow", secondAddr + ":7100"}})
	registry := n.startInternet(t, h)
	homes := map[string]*site.Home{}
	newHome := func(project string) *site.Home {
		if homes[project] == nil {
			s.CreateProject(t, project, nil)
			homes[project] = s.NewHome(t, s.ProjectToken(t, project))
			homes[project].CreateBuilder(t, project)
			homes[project].Buildx(t, "inspect", "--bootstrap")
		}
		return homes[project]
	}
	home := newHome("web")
	newHome("other")
	n.watched = n.forbid(t, s, h)
	n.watch(t, n.watched)
	t.Run("egress", func(t *testing.T) { egress(t, home, registry) })
	t.Run("forbidden", func(t *testing.T) { n.checkForbidden(t, newHome, n.watched) })
	t.Run("one port twice", func(t *testing.T) { onePortTwice(t, home) })
}

// hostState is what machines change of a host's network: its devices, its
// firewall, and what it forwards.
func hostState(t *testing.T, end *site.Netns) []string {
	t.Helper()
	var lines []string
	for _, args := range [][]string{
		{"ip", "-br", "link"},
		{"iptables", "-S"},
		{"iptables", "-t", "nat", "-S"},
		{"sh", "-c", "nft list tables | grep -v watch"},
		{"sysctl", "-a", "--pattern", `^net\.ipv4\..*forwarding`},
	} {
		lines = append(lines, strings.Split(end.Run(t, args...), "\n")...)
	}
	return lines
}

// startInternet starts a web server, a git server and a registry that the
// host's machines trust, and returns the registry's host:port.
func (n *network) startInternet(t *testing.T, h *site.Host) string {
	t.Helper()
	repos := t.TempDir()
	repo := filepath.Join(repos, "repo")
	git := func(args ...string) {
		cmd := exec.CommandContext(t.Context(), "git", append([]string{"-c", "user.name=a", "-c", "user.email=a@b", "-C", repos}, args...)...) //nolint:gosec // the test's own arguments
		cmd.Env = append(site.Environ(), "HOME="+repos)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v: %s", args, err, out)
		}
	}
	git("init", "-q", "-b", "main", "repo")
	write(t, filepath.Join(repo, "Dockerfile"), "FROM scratch\nCOPY Dockerfile /from-git\n")
	git("-C", "repo", "add", ".")
	git("-C", "repo", "commit", "-q", "-m", "one")
	git("clone", "-q", "--bare", "repo", "repo.git")
	mux := http.NewServeMux()
	mux.HandleFunc("/", hello)
	mux.Handle("/repo.git/", &cgi.Handler{
		Path: "/usr/lib/git-core/git-http-backend", Env: []string{"GIT_PROJECT_ROOT=" + repos, "GIT_HTTP_EXPORT_ALL=1", "HOME=" + repos},
	})
	n.serve(t, n.internet, internetAddr+":80", mux)
	n.serve(t, n.internet, "["+internet6+"]:80", mux)

	dir := t.TempDir()
	certPEM, keyPEM := selfSigned(t, &x509.Certificate{IPAddresses: []net.IP{net.ParseIP(internetAddr)}})
	write(t, filepath.Join(dir, "cert.pem"), string(certPEM))
	write(t, filepath.Join(dir, "key.pem"), string(keyPEM))
	// The host's own bundle, as machines get it, with the registry's authority.
	bundles, err := filepath.Glob(filepath.Join(h.StateDir, "local", "rootfs", "*", "etc", "ssl", "certs", "ca-certificates.crt"))
	if err != nil || len(bundles) != 1 {
		t.Fatalf("the machines' certificates: %v, %v", bundles, err)
	}
	bundle, err := os.OpenFile(bundles[0], os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bundle.Write(certPEM); err != nil {
		t.Fatal(err)
	}
	if err := bundle.Close(); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "config.yml"), fmt.Sprintf(
		"version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %[1]s/data}}\nhttp: {addr: '%[2]s:443', tls: {certificate: %[1]s/cert.pem, key: %[1]s/key.pem}}\n", dir, internetAddr))
	args := n.internet.Enter(filepath.Join(site.Deps(t), "bin", "docker-registry"), "serve", filepath.Join(dir, "config.yml"))
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), args[0], args[1:]...) //nolint:gosec // the test's own arguments
	cmd.Env, cmd.Dir = site.Environ(), dir
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	site.Eventually(t, "the registry answers", func() bool { return n.dial(t, n.internet, internetAddr+":443") })
	return internetAddr + ":443"
}

// dial reports whether a server answers from inside a namespace.
func (n *network) dial(t *testing.T, end *site.Netns, address string) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	conn, err := end.Dial(ctx, "tcp", address)
	if err != nil {
		return false
	}
	return conn.Close() == nil
}

// selfSigned returns a certificate for template's names and its key, PEM.
func selfSigned(t *testing.T, template *x509.Certificate) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(1)
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	template.IsCA, template.BasicConstraintsValid = true, true
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

// askFor is a RUN step that asks a web server. busybox's wget needs libraries.
func askFor(host, port string) string {
	return fmt.Sprintf(`RUN ["/bin/busybox","sh","-c","printf 'GET /page HTTP/1.0\\r\\n\\r\\n' | /bin/busybox nc -w 10 %s %s > /page && /bin/busybox grep hello /page"]`+"\n", host, port)
}

// probe is a RUN step that tries what is in the file /targets, "address port"
// each, and prints those that let it in.
const probe = "ARG N\nRUN [\"/bin/busybox\",\"sh\",\"-c\",\"while read a p; do (/bin/busybox nc -w 3 $a $p </dev/null >/dev/null 2>&1 && echo REACHED $a $p >&2) & done </targets; wait; echo PROBED >&2\"]\n"

const base = "FROM scratch AS base\nCOPY busybox /bin/busybox\n"

// egress reaches the internet by every way that a build has.
func egress(t *testing.T, home *site.Home, registry string) {
	t.Helper()
	web := "http://" + internetAddr
	image, cache := registry+"/image:1", "type=registry,ref="+registry+"/cache:1"
	dir := site.Context(t, map[string]string{"Dockerfile": base + askFor(internetAddr, "80") + "ADD " + web + "/added /added\nADD " + web + "/repo.git /cloned\n"})
	home.Buildx(t, "build", "--push", "--tag", image, "--cache-to", cache+",mode=max", dir)
	from := site.Context(t, map[string]string{"Dockerfile": "FROM " + image + "\nRUN [\"/bin/busybox\",\"cat\",\"/page\",\"/added\",\"/cloned/Dockerfile\"]\n"})
	out := filepath.Join(t.TempDir(), "out")
	home.Buildx(t, "build", "--pull", from)
	home.Buildx(t, "build", "-o", "type=local,dest="+out, web+"/repo.git#main")
	if got := read(t, filepath.Join(out, "from-git")); !strings.Contains(got, "from-git") {
		t.Errorf("the git context gave %q", got)
	}
	home.Buildx(t, "prune", "--all", "--force")
	r := home.Buildx(t, "build", "--progress", "plain", "--cache-from", cache, dir)
	if n := strings.Count(r.All(), "CACHED"); n < 2 || !strings.Contains(r.All(), "importing cache manifest from "+registry) {
		t.Errorf("%d steps came from the imported cache:\n%s", n, r.All())
	}
	// What the pool allows by name is open, and nothing beside it.
	allowed := site.Context(t, map[string]string{"Dockerfile": base + "ADD http://" + secondAddr + ":7100/allowed /allowed\n" + askFor(secondAddr, "7100")})
	home.Buildx(t, "build", allowed)
}

// forbid starts servers at the addresses that machines are kept from, makes
// sure that each answers others, and returns their addresses.
func (n *network) forbid(t *testing.T, s *site.Site, h *site.Host) []string {
	t.Helper()
	// The wildcard has every address of the host: those given to it, Docker's
	// bridge, its ends of the machines' links, IPv6.
	n.serve(t, n.host, "[::]:7000", http.HandlerFunc(hello))
	n.serve(t, n.host, "[::]:7100", http.HandlerFunc(hello))
	n.serve(t, n.host, "127.0.0.1:7001", http.HandlerFunc(hello))
	n.serve(t, n.host, "[::1]:7001", http.HandlerFunc(hello))
	n.serve(t, n.internet, metadataAddr+":80", http.HandlerFunc(hello))
	n.serve(t, n.internet, "["+metadata6+"]:80", http.HandlerFunc(hello))

	var targets []string
	from := map[string]*site.Netns{} // who else reaches the address
	for line := range strings.SplitSeq(strings.TrimSpace(n.host.IP(t, "-o", "addr", "show", "scope", "global")), "\n") {
		fields := strings.Fields(line)
		addr, _, _ := strings.Cut(fields[3], "/")
		from[net.JoinHostPort(addr, "7000")] = n.host
	}
	if len(from) < 5 {
		t.Fatalf("the host has only the addresses %v", from)
	}
	for _, a := range []string{net.JoinHostPort(hostAddr, "7000"), net.JoinHostPort(host6, "7000"), net.JoinHostPort(hostAddr, "7100")} {
		from[a] = n.client
	}
	from[linkAddr+":7000"] = n.host
	from["127.0.0.1:7001"], from["[::1]:7001"] = n.host, n.host
	from[metadataAddr+":80"], from["["+metadata6+"]:80"] = n.host, n.host
	from[planeAddr+":8443"], from[planeAddr+":8444"] = n.client, n.client
	for _, m := range s.Machines(t) {
		if m.GetProject() == "default/other" {
			from[m.GetAddress()] = n.client
			targets = append(targets, inside(t, h, m.GetId()))
		}
	}
	for a, end := range from {
		site.Eventually(t, a+" answers others", func() bool { return n.dial(t, end, a) })
		targets = append(targets, a)
	}
	return targets
}

// inside starts a server in a machine's own network, makes sure that it answers
// there, and returns its address. Not even the host reaches it.
func inside(t *testing.T, h *site.Host, machine string) string {
	t.Helper()
	for _, p := range h.Processes(t, "depot-agent") {
		if p.Machine != machine {
			continue
		}
		within := func(args ...string) *exec.Cmd {
			args = append([]string{fmt.Sprintf("--net=/proc/%d/ns/net", p.Pid), "--"}, args...)
			return exec.CommandContext(context.WithoutCancel(t.Context()), "nsenter", args...) //nolint:gosec // the test's own arguments
		}
		server := within("busybox", "nc", "-ll", "-p", "7002", "-e", "/bin/true")
		if err := server.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = server.Process.Kill()
			_ = server.Wait()
		})
		out, err := within("ip", "-4", "-o", "addr", "show", "eth0").Output()
		if err != nil {
			t.Fatal(err)
		}
		addr, _, _ := strings.Cut(strings.Fields(string(out))[3], "/")
		site.Eventually(t, "the machine answers itself", func() bool { return within("busybox", "nc", "-w", "3", addr, "7002").Run() == nil })
		return addr + ":7002"
	}
	t.Fatalf("machine %s has no process", machine)
	return ""
}

// reached finds what a probe printed, but not its command.
var reached = regexp.MustCompile(`(?m)^#\d+ [\d.]+ REACHED`)

// checkForbidden tries the targets from RUN, and with all that buildkitd itself
// fetches: each is tried, and none answers.
func (n *network) checkForbidden(t *testing.T, home func(project string) *site.Home, targets []string) {
	t.Helper()
	list := internetAddr + " 80\n" // answers, to show that the probe can tell
	for _, target := range targets {
		host, port, _ := net.SplitHostPort(target)
		list += host + " " + port + "\n"
	}
	// buildkitd waits long for an answer, with few fetches at once: one target
	// of each kind, so that each is tried. RUN steps try them all.
	some := []string{hostAddr + ":7000", metadataAddr + ":80", planeAddr + ":8443"}
	var adds, gits, froms, imports []string
	for i, target := range some {
		adds = append(adds, fmt.Sprintf("FROM scratch AS s%d\nADD http://%s/x /x\n", i, target))
		gits = append(gits, fmt.Sprintf("FROM scratch AS s%d\nADD http://%s/r.git /x\n", i, target))
		froms = append(froms, fmt.Sprintf("FROM %s/image:1 AS s%d\n", target, i))
		imports = append(imports, "--cache-from", "type=registry,ref="+target+"/cache:1,registry.insecure=true")
	}
	before := n.answered.all()
	probing := site.Context(t, map[string]string{"Dockerfile": base + "COPY targets /targets\n" + probe, "targets": list})
	r := home("web").Buildx(t, "build", "--progress", "plain", probing)
	if got := reached.FindAllString(r.Err, -1); len(got) != 1 || !strings.Contains(r.Err, "REACHED "+internetAddr+" 80") || !strings.Contains(r.Err, "PROBED") {
		t.Errorf("the probe reached %d targets, want only the internet:\n%s", len(got), r.Err)
	}
	for name, args := range map[string][]string{
		"add":     {stages(t, adds)},
		"git":     {stages(t, gits)},
		"from":    {stages(t, froms)},
		"import":  append(imports, site.Context(t, map[string]string{"Dockerfile": base})),
		"context": {"http://" + hostAddr + ":7000/r.git"},
	} {
		// A machine for each, as buildkitd lets one build wait for another's
		// fetch.
		b := home(name).StartBuildx(t, append([]string{"build", "--progress", "plain"}, args...)...)
		want := some
		if name == "context" {
			want = some[:1]
		}
		n.waitTried(t, name, want)
		if err := syscall.Kill(-b.Pid(), syscall.SIGKILL); err != nil {
			t.Error(err)
		}
		b.Wait(t)
	}
	for address, count := range n.answered.all() {
		if address != internetAddr+":80" && count != before[address] {
			t.Errorf("%s was reached %d times", address, count-before[address])
		}
	}
}

// stages is a Dockerfile that needs all of the stages s0, s1, ….
func stages(t *testing.T, each []string) string {
	t.Helper()
	text := strings.Join(each, "") + "FROM scratch\n"
	for _, stage := range each {
		name := regexp.MustCompile(`AS (s\d+)`).FindStringSubmatch(stage)[1]
		text += "COPY --from=" + name + " / /" + name + "\n"
	}
	return site.Context(t, map[string]string{"Dockerfile": text})
}

// watch counts what machines send to each target, before any rule is asked.
func (n *network) watch(t *testing.T, targets []string) {
	t.Helper()
	rules := "table inet watch\ndelete table inet watch\ntable inet watch { chain tried { type filter hook prerouting priority -400;\n"
	for _, target := range targets {
		if host, port, _ := net.SplitHostPort(target); leaves(target) {
			rules += "iifname \"dp*\" ip daddr " + host + " tcp dport " + port + " counter\n"
		}
	}
	file := filepath.Join(t.TempDir(), "rules")
	write(t, file, rules+"}\n}\n")
	n.host.Run(t, "nft", "-f", file)
}

// leaves reports whether a packet to the target leaves a machine at all: they
// have no IPv6, and a loopback of their own.
func leaves(target string) bool {
	return !strings.HasPrefix(target, "[") && !strings.HasPrefix(target, "127.")
}

// waitTried waits until a machine has tried every target, and forgets that.
func (n *network) waitTried(t *testing.T, how string, targets []string) {
	t.Helper()
	for _, target := range targets {
		if !leaves(target) {
			continue
		}
		host, port, _ := net.SplitHostPort(target)
		tried := regexp.MustCompile(`ip daddr ` + regexp.QuoteMeta(host) + ` tcp dport ` + port + ` counter packets [1-9]`)
		site.Eventually(t, how+" has tried "+target, func() bool { return tried.MatchString(n.host.Run(t, "nft", "list", "table", "inet", "watch")) })
	}
	n.watch(t, n.watched)
}

// onePortTwice runs two steps at once that listen on the same port: each has a
// network of its own.
func onePortTwice(t *testing.T, home *site.Home) {
	t.Helper()
	step := func(own, other string) string {
		return fmt.Sprintf("FROM base AS %[1]s\nRUN --mount=type=cache,target=/meet [\"/bin/busybox\",\"sh\",\"-c\",\""+
			"b=/bin/busybox; $b nc -l -p 5432 & n=$!; $b touch /meet/%[1]s; until [ -e /meet/%[2]s ]; do $b sleep 0.1; done; $b sleep 0.5; kill $n\"]\n", own, other)
	}
	dir := site.Context(t, map[string]string{"Dockerfile": base + step("one", "two") + step("two", "one") +
		"FROM scratch\nCOPY --from=one /bin/busybox /1\nCOPY --from=two /bin/busybox /2\n"})
	home.Buildx(t, "build", dir)
}
