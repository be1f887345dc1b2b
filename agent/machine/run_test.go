package machine

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	bkclient "github.com/moby/buildkit/client"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/opendepot/depot/agent/provider"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/internal/mtls"
)

// program returns a program's path; tests run the real ones.
func program(tb testing.TB, name string) string {
	tb.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		tb.Fatalf("%s is not on PATH: build it (make build) and put its directory there", name)
	}
	return path
}

// bench is a machine with all that is around it.
type bench struct {
	controlPlane *controlPlane
	config       Config
	address      string
	terminate    chan os.Signal
	cancel       context.CancelFunc
	result       chan error
	log          *slog.Logger // nil means the test's output
}

// prepare makes the surroundings of a machine and starts nothing.
func prepare(tb testing.TB) *bench {
	tb.Helper()
	dir := tb.TempDir()
	run := filepath.Join(dir, "run")
	c := newControlPlane(tb, run)
	if err := os.WriteFile(filepath.Join(run, "join-token"), []byte("join\n"), 0o600); err != nil {
		tb.Fatal(err)
	}
	return &bench{
		controlPlane: c,
		config: Config{
			MachineID: testID("mch", "1"), ServerID: c.id, Arch: "amd64",
			ControlPlane: ControlPlane{URL: "https://controlplane.test", Pin: mtls.PinOf(c.server.cert)},
			Paths: Paths{
				Run: run, Root: filepath.Join(dir, "root"), Work: filepath.Join(dir, "work"),
				Buildkitd: program(tb, "buildkitd"), Runc: program(tb, "buildkit-runc"), CNIConfig: "host",
				Cgroup: filepath.Join(dir, "cgroup"), // the real one is shared with others here
			},
		},
		terminate: make(chan os.Signal, 2),
		result:    make(chan error, 1),
	}
}

// start runs the machine in this process; the test's end ends it.
func (b *bench) start(tb testing.TB) {
	tb.Helper()
	if err := os.MkdirAll(b.config.Paths.Root, 0o700); err != nil {
		tb.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // at once
	if err != nil {
		tb.Fatal(err)
	}
	b.address = listener.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	b.cancel = cancel
	output := tb.Output()
	if b.log == nil {
		b.log = slog.New(slog.NewTextHandler(output, nil))
	} else {
		output = io.Discard
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.result <- Run(ctx, b.config, Surroundings{Listener: listener, Terminate: b.terminate, Log: b.log, Output: output})
	}()
	tb.Cleanup(func() {
		cancel()
		<-done
	})
}

func (b *bench) ready(tb testing.TB) {
	tb.Helper()
	b.controlPlane.await(tb, "ready", func(r *depotv1.SyncMachineRequest) bool {
		return r.GetState() == depotv1.MachineState_MACHINE_STATE_READY
	})
}

// ended waits for the machine's end and returns what it left behind.
func (b *bench) ended(tb testing.TB) (provider.Exit, error) {
	tb.Helper()
	var err error
	select {
	case err = <-b.result:
	case <-time.After(30 * time.Second):
		tb.Fatal("the machine did not end within 30 s")
	}
	return readExit(tb, b.config.Paths), err
}

func readExit(tb testing.TB, p Paths) provider.Exit {
	tb.Helper()
	data, err := os.ReadFile(p.exit())
	if err != nil {
		tb.Fatal(err)
	}
	var e provider.Exit
	if err := json.Unmarshal(data, &e); err != nil {
		tb.Fatal(err)
	}
	return e
}

func (b *bench) leafName(lease string) mtls.LeafName {
	return mtls.LeafName{Server: b.controlPlane.id, Lease: lease, Machine: b.config.MachineID}
}

// tls is the configuration of a client with a lease.
func (b *bench) tls(tb testing.TB, lease string) *tls.Config {
	tb.Helper()
	return mtls.Client{
		Identity:   b.controlPlane.project.identity(tb, forClient, named(b.leafName(lease))),
		Anchors:    b.controlPlane.project.anchors(tb),
		ServerName: machineName, NextProtos: []string{"h2"},
	}.Config()
}

// dial makes a bare connection to the front.
func (b *bench) dial(tb testing.TB, config *tls.Config) (*tls.Conn, error) {
	tb.Helper()
	conn, err := (&tls.Dialer{Config: config}).DialContext(tb.Context(), "tcp", b.address)
	if err != nil {
		return nil, err
	}
	return conn.(*tls.Conn), nil //nolint:errcheck,forcetypeassert // as documented
}

// client is a BuildKit client through the front.
func (b *bench) client(tb testing.TB, lease string) *bkclient.Client {
	tb.Helper()
	return b.clientAt(tb, lease, b.address)
}

// clientAt is the same for another address.
func (b *bench) clientAt(tb testing.TB, lease, address string) *bkclient.Client {
	tb.Helper()
	config := b.tls(tb, lease)
	c, err := bkclient.New(tb.Context(), "tcp://"+address,
		bkclient.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", address)
		}),
		bkclient.WithGRPCDialOption(grpc.WithTransportCredentials(insecure.NewCredentials())))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = c.Close() })
	return c
}

func open(r *depotv1.SyncMachineRequest) map[string][2]int64 {
	out := map[string][2]int64{}
	for _, c := range r.GetConnections() {
		out[c.GetLeaseId()] = [2]int64{int64(c.GetOpen()), c.GetTotal()}
	}
	return out
}

func awaitOpen(tb testing.TB, b *bench, want map[string][2]int64) {
	tb.Helper()
	b.controlPlane.await(tb, "connections", func(r *depotv1.SyncMachineRequest) bool { return cmp.Equal(want, open(r)) })
}

func TestMachineLife(t *testing.T) {
	b := prepare(t)
	b.start(t)
	b.ready(t)
	if _, err := os.Stat(b.config.Paths.joinToken()); !os.IsNotExist(err) {
		t.Errorf("the join token is still there: %v", err)
	}
	one, two := testID("lse", "1"), testID("lse", "2")
	first, second := b.client(t, one), b.client(t, two)
	for _, c := range []*bkclient.Client{first, second} {
		if _, err := c.ListWorkers(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	awaitOpen(t, b, map[string][2]int64{one: {1, 1}, two: {1, 1}})
	report := b.controlPlane.await(t, "version", func(r *depotv1.SyncMachineRequest) bool { return r.GetBuildkitVersion() != "" })
	if u := report.GetUsage(); u.GetDiskUsedBytes() <= 0 || u.GetDiskFreeBytes() <= 0 {
		t.Errorf("usage is not measured: %v", u)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	awaitOpen(t, b, map[string][2]int64{one: {1, 1}, two: {0, 1}})

	// It drains: the client that is connected goes on, another is refused at once.
	b.controlPlane.direct(&depotv1.SyncMachineResponse{Drain: true})
	b.controlPlane.await(t, "draining", func(r *depotv1.SyncMachineRequest) bool {
		return r.GetState() == depotv1.MachineState_MACHINE_STATE_DRAINING
	})
	if _, err := first.ListWorkers(t.Context()); err != nil {
		t.Errorf("while draining, for a client that was connected: %v", err)
	}
	if conn, err := b.dial(t, b.tls(t, two)); err == nil {
		_ = conn.Close()
		t.Error("a client was let in while draining")
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	exit, err := b.ended(t)
	if err != nil || !cmp.Equal(exit, provider.Exit{Clean: true}) {
		t.Errorf("ended with %+v, %v", exit, err)
	}
	b.controlPlane.await(t, "stopped", func(r *depotv1.SyncMachineRequest) bool {
		return r.GetState() == depotv1.MachineState_MACHINE_STATE_STOPPED
	})
}

func TestTerminate(t *testing.T) {
	b := prepare(t)
	b.start(t)
	b.ready(t)
	c := b.client(t, testID("lse", "1"))
	if _, err := c.ListWorkers(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.terminate <- unix.SIGTERM
	b.controlPlane.await(t, "draining", func(r *depotv1.SyncMachineRequest) bool {
		return r.GetState() == depotv1.MachineState_MACHINE_STATE_DRAINING
	})
	b.terminate <- unix.SIGTERM
	if _, err := c.ListWorkers(t.Context()); err != nil {
		t.Errorf("TERM cut a connection: %v", err)
	}
	b.terminate <- unix.SIGINT
	exit, err := b.ended(t)
	if err != nil || !exit.Clean {
		t.Errorf("ended with %+v, %v", exit, err)
	}
}
