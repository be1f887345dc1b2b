package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/buildkit/client"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/e2e/site"
)

// measurement takes one or more figures on a site of its own.
type measurement struct {
	names []string
	run   func(tb *tb, runs int) []figure
}

func measurements() []measurement {
	return []measurement{
		{[]string{"warm_noop_vs_remote"}, warmNoop},
		{[]string{"cold_machine_vs_buildkitd"}, coldMachine},
		{[]string{"front_upload_vs_direct"}, frontUpload},
		{[]string{"leases_200_p99", "controlplane_idle_rss", "agent_idle_rss"}, leases200},
	}
}

const noopDockerfile = "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\",\"true\"]\n"

// newSite makes a site with a host, a project and a home with its builder.
func newSite(tb *tb) (*site.Site, *site.Host, *site.Home) {
	s := site.New(tb, site.Config{})
	h := s.AddHost(tb, site.HostConfig{PoolSize: "20GiB"})
	s.CreateProject(tb, "web", nil)
	home := s.NewHome(tb, s.ProjectToken(tb, "web"))
	home.CreateBuilder(tb, "web")
	return s, h, home
}

// warmNoop compares a build that has nothing to do through the driver with the
// same through buildx's remote driver, to the same machine.
func warmNoop(tb *tb, runs int) []figure {
	s, _, home := newSite(tb)
	dir := site.Context(tb, map[string]string{"Dockerfile": noopDockerfile})
	stop := remoteBuilder(tb, s, home)
	defer stop()
	build := func(builder string) float64 {
		begin := time.Now()
		home.Buildx(tb, "build", "--builder", builder, dir)
		return seconds(time.Since(begin)) * 1000
	}
	build("depot")
	build("remote")
	f := figure{
		Name: "warm_noop_vs_remote", Unit: "ms", Bound: 1.15, Runs: runs,
		BaselineCommand: "docker-buildx build --builder remote CONTEXT (create --driver remote --driver-opt cacert=…,cert=…,key=…,servername=… tcp://MACHINE)",
	}
	for range runs {
		f.Series = append(f.Series, build("depot"))
		f.BaselineSeries = append(f.BaselineSeries, build("remote"))
	}
	f.Value, f.Baseline = median(f.Series), median(f.BaselineSeries)
	f.Ratio = f.Value / f.Baseline
	begin := time.Now()
	l, err := acquire(tb.Context(), s.API(tb, s.ProjectToken(tb, "web")).Builder)
	if err != nil {
		tb.Fatalf("lease: %v", err)
	}
	leased := time.Since(begin)
	if err := l.release(tb.Context()); err != nil {
		tb.Fatalf("release: %v", err)
	}
	f.Dominated = fmt.Sprintf("buildx itself; a lease costs %.0f ms of it", seconds(leased)*1000)
	return []figure{f}
}

// remoteBuilder makes a builder with the stock remote driver for the project's
// machine, by a lease that is kept until stop is called.
func remoteBuilder(tb *tb, s *site.Site, home *site.Home) (stop func()) {
	l, err := acquire(tb.Context(), s.API(tb, s.ProjectToken(tb, "web")).Builder)
	if err != nil {
		tb.Fatalf("lease for the remote driver: %v", err)
	}
	ctx, cancel := context.WithCancel(tb.Context())
	var wg sync.WaitGroup
	wg.Go(func() { l.keep(ctx) })
	ca, cert, key := l.files(tb, tb.TempDir())
	home.Buildx(tb, "create", "--driver", "remote", "--name", "remote",
		"--driver-opt", "cacert="+ca+",cert="+cert+",key="+key+",servername="+l.endpoint.GetServerName(),
		"tcp://"+l.endpoint.GetAddress())
	return func() {
		cancel()
		wg.Wait()
		if err := l.release(context.WithoutCancel(ctx)); err != nil {
			tb.Errorf("release: %v", err)
		}
	}
}

// coldMachine compares the time from no machine to one that answers its client
// with that of a bare buildkitd from exec to its first answer.
func coldMachine(tb *tb, runs int) []figure {
	s, h, _ := newSite(tb)
	api := s.API(tb, s.ProjectToken(tb, "web"))
	f := figure{
		Name: "cold_machine_vs_buildkitd", Unit: "ms", Bound: 3, Runs: runs,
		BaselineCommand: "buildkitd --config (runc worker, overlayfs, root on the same btrfs pool) --addr unix://…, until ListWorkers answers",
	}
	var launch, start, connect []float64
	for i := range runs + 1 {
		begin := time.Now()
		l, err := acquire(tb.Context(), api.Builder)
		if err != nil {
			tb.Fatalf("lease: %v", err)
		}
		leased := time.Now()
		if err := l.answer(tb.Context(), s.ClientNet); err != nil {
			tb.Fatalf("first call: %v", err)
		}
		end := time.Now()
		if err := l.release(tb.Context()); err != nil {
			tb.Fatalf("release: %v", err)
		}
		m := s.Machines(tb)[0]
		stopAll(tb, s)
		bare := bareStart(tb, h)
		if i == 0 {
			continue // it made the volume
		}
		f.Series = append(f.Series, seconds(end.Sub(begin))*1000)
		f.BaselineSeries = append(f.BaselineSeries, bare)
		launch = append(launch, seconds(m.GetCreated().AsTime().Sub(begin))*1000)
		start = append(start, seconds(m.GetReady().AsTime().Sub(m.GetCreated().AsTime()))*1000)
		connect = append(connect, seconds(end.Sub(leased))*1000)
	}
	f.Value, f.Baseline = median(f.Series), median(f.BaselineSeries)
	f.Ratio = f.Value / f.Baseline
	f.Dominated = fmt.Sprintf("launch, registration and buildkitd's start: %.0f ms; asking took %.0f ms, connecting %.0f ms", median(start), median(launch), median(connect))
	return []figure{f}
}

// stopAll has all machines stop, and waits until they are gone.
func stopAll(tb *tb, s *site.Site) {
	for _, m := range s.Machines(tb) {
		if _, err := s.Admin(tb).Admin.StopMachine(tb.Context(), &depotv1.StopMachineRequest{Id: m.GetId(), Now: true}); err != nil {
			tb.Fatalf("stop machine: %v", err)
		}
	}
	s.WaitMachines(tb, 0)
}

const bareConfig = `root = %q
[grpc]
  address = [%q]
[cdi]
  disabled = true
[worker.containerd]
  enabled = false
[worker.oci]
  enabled = true
  snapshotter = "overlayfs"
  binary = %q
`

// bare starts a buildkitd with nothing around it and returns how long its first
// answer took, in milliseconds.
func bare(tb *tb, root string) (cmd *exec.Cmd, took float64) {
	dir := tb.TempDir()
	address := "unix://" + filepath.Join(dir, "buildkitd.sock")
	config := filepath.Join(dir, "buildkitd.toml")
	text := fmt.Sprintf(bareConfig, root, address, filepath.Join(site.Bin(tb), "buildkit-runc"))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		tb.Fatalf("%v", err)
	}
	begin := time.Now()
	cmd = exec.Command(filepath.Join(site.Bin(tb), "buildkitd"), "--config", config) //nolint:gosec,noctx // ended by end
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var log strings.Builder
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		tb.Fatalf("start buildkitd: %v", err)
	}
	socket := strings.TrimPrefix(address, "unix://")
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for ; time.Since(begin) < time.Minute; <-tick.C {
		if _, err := os.Stat(socket); err == nil && listWorkers(tb.Context(), address) == nil {
			return cmd, seconds(time.Since(begin)) * 1000
		}
	}
	end(tb, cmd)
	tb.Fatalf("buildkitd did not answer within a minute: %s", log.String())
	return nil, 0
}

func listWorkers(ctx context.Context, address string) error {
	c, err := client.New(ctx, address)
	if err != nil {
		return err
	}
	defer c.Close() //nolint:errcheck // nothing was written
	_, err = c.ListWorkers(ctx)
	return err
}

// end stops a bare buildkitd.
func end(tb *tb, cmd *exec.Cmd) {
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		tb.Errorf("stop buildkitd: %v", err)
	}
	_ = cmd.Wait() // buildkitd exits with 1 after TERM
}

// scratchRoot is a directory on the filesystem of the host's volumes.
func scratchRoot(tb *tb, h *site.Host) string {
	dir, err := os.MkdirTemp(filepath.Join(h.StateDir, "volumes", "pool"), "bench-")
	if err != nil {
		tb.Fatalf("%v", err)
	}
	return dir
}

func bareStart(tb *tb, h *site.Host) float64 {
	root := scratchRoot(tb, h)
	cmd, took := bare(tb, root)
	end(tb, cmd)
	if err := os.RemoveAll(root); err != nil {
		tb.Errorf("%v", err)
	}
	return took
}

const uploadBytes = 400 << 20

// frontUpload compares the rate of a context's upload through the machine's
// TLS front with that to a buildkitd that ends TLS itself.
func frontUpload(tb *tb, runs int) []figure {
	runs = min(runs, 5)
	s, h, home := newSite(tb)
	stop := remoteBuilder(tb, s, home)
	defer stop()
	root := scratchRoot(tb, h)
	dir := tb.TempDir()
	ca, cert, key := selfSigned(tb, dir)
	l, err := s.ClientNet.Listen(tb.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatalf("%v", err)
	}
	port := l.Addr().String()
	_ = l.Close() // its number is what was wanted
	direct := directBuildkitd(tb, s, root, port, ca, cert, key)
	defer func() {
		end(tb, direct)
		if err := os.RemoveAll(root); err != nil {
			tb.Errorf("%v", err)
		}
	}()
	home.Buildx(tb, "create", "--driver", "remote", "--name", "direct",
		"--driver-opt", "cacert="+ca+",cert="+cert+",key="+key+",servername=localhost", "tcp://"+port)
	context := site.Context(tb, map[string]string{"Dockerfile": "FROM scratch\nCOPY blob /blob\n"})
	upload := func(builder string) float64 {
		fill(tb, filepath.Join(context, "blob"))
		begin := time.Now()
		home.Buildx(tb, "build", "--builder", builder, context)
		return uploadBytes / float64(1<<20) / seconds(time.Since(begin))
	}
	f := figure{
		Name: "front_upload_vs_direct", Unit: "MiB/s", Bound: 0.8, Runs: runs, atLeast: true,
		BaselineCommand: "docker-buildx build --builder direct CONTEXT (400 MiB; buildkitd with its own TLS on the same btrfs pool)",
		Dominated:       "writing the context to the cache; the front adds one decryption and one copy through a unix socket",
	}
	upload("direct")
	upload("remote")
	for range runs {
		f.Series = append(f.Series, upload("remote"))
		f.BaselineSeries = append(f.BaselineSeries, upload("direct"))
	}
	f.Value, f.Baseline = median(f.Series), median(f.BaselineSeries)
	f.Ratio = f.Value / f.Baseline
	return []figure{f}
}

// directBuildkitd starts a buildkitd that serves TLS by itself, in the site's
// namespace.
func directBuildkitd(tb *tb, s *site.Site, root, port, ca, cert, key string) *exec.Cmd {
	dir := tb.TempDir()
	config := filepath.Join(dir, "buildkitd.toml")
	text := fmt.Sprintf(bareConfig, root, "tcp://"+port, filepath.Join(site.Bin(tb), "buildkit-runc")) +
		fmt.Sprintf("[grpc.tls]\n  cert = %q\n  key = %q\n  ca = %q\n", cert, key, ca)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		tb.Fatalf("%v", err)
	}
	args := s.HostNet.Enter(filepath.Join(site.Bin(tb), "buildkitd"), "--config", config)
	cmd := exec.Command(args[0], args[1:]...) //nolint:gosec,noctx // ended by end
	if err := cmd.Start(); err != nil {
		tb.Fatalf("start buildkitd: %v", err)
	}
	site.Eventually(tb, "buildkitd listens", func() bool {
		conn, err := s.ClientNet.Dial(tb.Context(), "tcp", port)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
	return cmd
}

// fill writes new random bytes, so that nothing of a context was sent before.
func fill(tb *tb, path string) {
	f, err := os.Create(path)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	defer f.Close() //nolint:errcheck // Sync tells
	block := make([]byte, 1<<20)
	for range uploadBytes >> 20 {
		_, _ = rand.Read(block) // never fails: see crypto/rand
		if _, err := f.Write(block); err != nil {
			tb.Fatalf("%v", err)
		}
	}
	if err := f.Sync(); err != nil {
		tb.Fatalf("%v", err)
	}
}

// leases200 asks for 200 leases at once, from 200 clients with connections of
// their own, and reads what the idle daemons take.
func leases200(tb *tb, _ int) []figure {
	const n = 200
	s, h, _ := newSite(tb)
	token := s.ProjectToken(tb, "web")
	first, err := acquire(tb.Context(), s.API(tb, token).Builder)
	if err != nil {
		tb.Fatalf("lease: %v", err)
	}
	leases := make([]*lease, n)
	took := make([]float64, n)
	errs := make([]error, n)
	var wg sync.WaitGroup
	go1 := make(chan struct{})
	for i := range n {
		api := s.API(tb, token)
		wg.Go(func() {
			<-go1
			begin := time.Now()
			if leases[i], errs[i] = acquire(tb.Context(), api.Builder); errs[i] != nil {
				return
			}
			conn, err := leases[i].dial(tb.Context(), s.ClientNet)
			took[i] = seconds(time.Since(begin)) * 1000
			if err != nil {
				errs[i] = err
				return
			}
			errs[i] = conn.Close()
		})
	}
	close(go1)
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		tb.Fatalf("%v", err)
	}
	for _, l := range append(leases, first) {
		if err := l.release(tb.Context()); err != nil {
			tb.Fatalf("release: %v", err)
		}
	}
	stopAll(tb, s)
	return []figure{
		{
			Name: "leases_200_p99", Unit: "ms", Value: quantile(took, 0.99), Bound: 2000, Runs: 1, Series: took,
			Dominated: fmt.Sprintf("signing and TLS handshakes on %d clients in one process (median %.0f ms)", n, median(took)),
		},
		rss(tb, "controlplane_idle_rss", s.ControlPlane.Pid(), "the program's own pages, SQLite's and Go's heap"),
		rss(tb, "agent_idle_rss", h.Agent.Pid(), "the program's own pages: it links BuildKit's client for the machine agent"),
	}
}

// rss reads a daemon's resident memory.
func rss(tb *tb, name string, pid int, dominated string) figure {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		tb.Fatalf("%v", err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			if err != nil {
				tb.Fatalf("%v", err)
			}
			mb := kb * 1024 / 1e6
			return figure{Name: name, Unit: "MB", Value: mb, Bound: 60, Runs: 1, Series: []float64{mb}, Dominated: dominated}
		}
	}
	tb.Fatalf("no VmRSS of process %d", pid)
	return figure{}
}

// fileKey makes a key that may be written to a file, and a request for it.
func fileKey(tb site.TB) (csr, key []byte) {
	tb.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	if csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k); err != nil {
		tb.Fatalf("%v", err)
	}
	if key, err = x509.MarshalPKCS8PrivateKey(k); err != nil {
		tb.Fatalf("%v", err)
	}
	return csr, key
}

// selfSigned writes a certificate that is its own authority, for both sides of
// the direct buildkitd.
func selfSigned(tb *tb, dir string) (ca, cert, key string) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			tb.Fatalf("%v", err)
		}
	}
	if _, err := tls.LoadX509KeyPair(cert, key); err != nil {
		tb.Fatalf("%v", err)
	}
	return cert, cert, key
}
