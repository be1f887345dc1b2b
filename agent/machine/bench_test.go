package machine

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	bkclient "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/tonistiigi/fsutil"
	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/internal/mtls"
)

const (
	uploadBytes = 400 << 20
	chunk       = 64 << 10 // what a client writes at once
)

// BenchmarkFront sends 400 MB: through the front to a unix socket, and to a
// TLS server that reads it itself, which is what buildkitd does without a
// front. Both are this process, with the same TLS.
func BenchmarkFront(b *testing.B) {
	sunk := make(chan int64, 1)
	sink := func(c io.ReadCloser) {
		n, _ := io.CopyBuffer(io.Discard, struct{ io.Reader }{c}, make([]byte, chunk))
		_ = c.Close()
		sunk <- n
	}
	s := newStand(b, func(c *net.UnixConn) { sink(c) })
	config := s.client(b, s.project.identity(b, forClient, named(s.name(testID("lse", "1")))))
	server := mtls.Server{Identity: s.server, Anchors: s.anchors, NextProtos: []string{"h2"}}.Config()
	direct, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = direct.Close() })
	go func() {
		for {
			c, err := direct.Accept()
			if err != nil {
				return
			}
			go sink(c)
		}
	}()
	for _, way := range []struct{ name, address string }{{"front", s.address}, {"direct", direct.Addr().String()}} {
		b.Run(way.name, func(b *testing.B) {
			b.SetBytes(uploadBytes)
			data := make([]byte, chunk)
			for b.Loop() {
				conn, err := (&tls.Dialer{Config: config}).DialContext(b.Context(), "tcp", way.address)
				if err != nil {
					b.Fatal(err)
				}
				for range uploadBytes / chunk {
					if _, err := conn.Write(data); err != nil {
						b.Fatal(err)
					}
				}
				if err := conn.Close(); err != nil {
					b.Fatal(err)
				}
				if n := <-sunk; n != uploadBytes {
					b.Fatalf("%d bytes arrived", n)
				}
			}
		})
	}
}

// tlsDaemon is a buildkitd that does its own TLS, and a client of it.
func tlsDaemon(b *testing.B, m *bench) *bkclient.Client {
	b.Helper()
	dir := b.TempDir()
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			b.Fatal(err)
		}
		return path
	}
	server := certificate(b, m.controlPlane.project, forServer(machineName))
	key, err := x509.MarshalPKCS8PrivateKey(server.PrivateKey)
	if err != nil {
		b.Fatal(err)
	}
	probe, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // at once
	if err != nil {
		b.Fatal(err)
	}
	address := probe.Addr().String()
	if err := probe.Close(); err != nil {
		b.Fatal(err)
	}
	cmd := exec.CommandContext(context.Background(), program(b, "buildkitd"), //nolint:gosec // the real one
		"--addr", "tcp://"+address, "--root", filepath.Join(dir, "root"),
		"--tlscert", write("cert.pem", "CERTIFICATE", server.Certificate[0]),
		"--tlskey", write("key.pem", "PRIVATE KEY", key),
		"--tlscacert", write("ca.pem", "CERTIFICATE", m.controlPlane.project.cert.Raw),
		"--oci-worker-snapshotter", "overlayfs", "--containerd-worker=false", "--otel-socket-path", filepath.Join(dir, "otel.sock"))
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = cmd.Process.Signal(unix.SIGTERM)
		_ = cmd.Wait()
	})
	c := m.clientAt(b, testID("lse", "1"), address)
	ctx, cancel := context.WithTimeout(b.Context(), 30*time.Second)
	defer cancel()
	if err := c.Wait(ctx); err != nil {
		b.Fatal(err)
	}
	return c
}

// BenchmarkUpload sends a context of 400 MB to a real buildkitd: through the
// front, to one that does its own TLS, and to a unix socket without TLS.
func BenchmarkUpload(b *testing.B) {
	machine := prepare(b)
	machine.log = slog.New(slog.DiscardHandler)
	machine.start(b)
	machine.ready(b)
	plain, err := bkclient.New(b.Context(), "unix://"+filepath.Join(machine.config.Paths.Work, "buildkitd.sock"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = plain.Close() })
	fronted := machine.client(b, testID("lse", "1"))
	n := 0
	for _, way := range []struct {
		name   string
		client *bkclient.Client
	}{{"front", fronted}, {"own TLS", tlsDaemon(b, machine)}, {"unix", plain}} {
		b.Run(way.name, func(b *testing.B) {
			b.SetBytes(uploadBytes)
			for b.Loop() {
				b.StopTimer()
				n++
				dir := b.TempDir()
				data := make([]byte, uploadBytes)
				copy(data, fmt.Sprint("upload ", n))
				if err := os.WriteFile(filepath.Join(dir, "data"), data, 0o600); err != nil {
					b.Fatal(err)
				}
				files, err := fsutil.NewFS(dir)
				if err != nil {
					b.Fatal(err)
				}
				name := fmt.Sprint("context", n)
				def, err := llb.Scratch().File(llb.Copy(llb.Local(name), "/data", "/data")).Marshal(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				_, err = way.client.Solve(b.Context(), def, bkclient.SolveOpt{LocalMounts: map[string]fsutil.FS{name: files}}, nil)
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
