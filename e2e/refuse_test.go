package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/net/http2"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/e2e/site"
	"github.com/opendepot/depot/internal/mtls"
)

// claim is a lease as its client has it, with a key that the test may misuse.
type claim struct {
	id       string
	endpoint *depotv1.Endpoint
	cert     tls.Certificate
}

// newKey returns a key and a certificate request for it.
func newKey(t *testing.T) (key *ecdsa.PrivateKey, csr []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key); err != nil {
		t.Fatal(err)
	}
	return key, csr
}

func newID(kind string) string {
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails: see crypto/rand
	return fmt.Sprintf("%s_%x", kind, id)
}

// acquire asks for a lease until it is ready or ended; an ended one is an error.
func acquire(ctx context.Context, api *client.Client, req *depotv1.AcquireLeaseRequest) (*depotv1.AcquireLeaseResponse, error) {
	for {
		resp, err := api.Builder.AcquireLease(ctx, req)
		switch {
		case err != nil:
			return nil, err
		case resp.GetState() == depotv1.LeaseState_LEASE_STATE_READY:
			return resp, nil
		case resp.GetState() == depotv1.LeaseState_LEASE_STATE_ENDED:
			return nil, errors.New(resp.GetReason())
		}
	}
}

// newClaim leases a machine.
func newClaim(t *testing.T, api *client.Client, project string) claim {
	t.Helper()
	key, csr := newKey(t)
	c := claim{id: newID("lse")}
	resp, err := acquire(t.Context(), api, &depotv1.AcquireLeaseRequest{
		LeaseId: c.id, Project: &depotv1.ProjectRef{Name: project}, Arch: site.NativeArch(), Csr: csr, Launch: true,
	})
	if err != nil {
		t.Fatalf("lease a machine: %v", err)
	}
	c.endpoint = resp.GetEndpoint()
	c.cert = tls.Certificate{Certificate: resp.GetCertificate().GetChain(), PrivateKey: key}
	return c
}

// open connects to the machine of an endpoint with a certificate, until the
// daemon behind its front has answered.
func open(ctx context.Context, from *site.Netns, e *depotv1.Endpoint, cert *tls.Certificate, newest uint16) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	raw, err := from.Dial(ctx, "tcp", e.GetAddress())
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	for _, der := range e.GetTrustAnchors() {
		anchor, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		roots.AddCert(anchor)
	}
	config := &tls.Config{RootCAs: roots, ServerName: e.GetServerName(), NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12, MaxVersion: newest}
	if cert != nil {
		// Also where the server's request names other authorities.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	conn := tls.Client(raw, config)
	err = conn.HandshakeContext(ctx)
	if err == nil {
		// In TLS 1.3 the server may refuse after the client's handshake: what
		// is read tells, whether or not the writes came through.
		_, _ = io.WriteString(conn, http2.ClientPreface)
		_ = http2.NewFramer(conn, nil).WriteSettings()
		if err = conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err == nil {
			_, err = http2.NewFramer(nil, conn).ReadFrame()
		}
	}
	if err != nil {
		return nil, errors.Join(err, raw.Close())
	}
	return conn, conn.SetReadDeadline(time.Time{})
}

// refusal fails the test if the machine lets the certificate in, or refuses it
// other than in TLS.
func refusal(t *testing.T, s *site.Site, e *depotv1.Endpoint, cert *tls.Certificate, newest uint16) {
	t.Helper()
	conn, err := open(t.Context(), s.ClientNet, e, cert, newest)
	if err == nil {
		_ = conn.Close()
		t.Fatal("the machine let it in")
	}
	var alert tls.AlertError
	if op := (*net.OpError)(nil); !errors.As(err, &alert) && (!errors.As(err, &op) || op.Op != "remote error") {
		t.Errorf("refused by %v, want an alert", err)
	}
}

// waitCut waits for a connection's end.
func waitCut(t *testing.T, conn net.Conn) {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	_, err := io.Copy(io.Discard, conn)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection was not cut within a minute")
	}
	_ = conn.Close()
}

// TestCertificatesRefused shows to a machine whatever is not the certificate of
// one of its own leases (own-lease).
func TestCertificatesRefused(t *testing.T) {
	t.Parallel()
	s := site.New(t, site.Config{})
	s.AddHost(t, site.HostConfig{})
	apis := map[string]*client.Client{}
	for _, project := range []string{"a", "b"} {
		s.CreateProject(t, project, nil)
		apis[project] = s.API(t, s.ProjectToken(t, project))
	}
	a, b := newClaim(t, apis["a"], "a"), newClaim(t, apis["b"], "b")
	for _, c := range []claim{a, b} {
		conn, err := open(t.Context(), s.ClientNet, c.endpoint, &c.cert, tls.VersionTLS13)
		if err != nil {
			t.Fatalf("a lease's own certificate: %v", err)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
	certPEM, keyPEM := selfSigned(t, &x509.Certificate{URIs: leafOf(t, a.cert).URIs, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	forged, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	identity := joinAgent(t, s)
	t.Run("project A at a machine of B", func(t *testing.T) { refusal(t, s, b.endpoint, &a.cert, tls.VersionTLS13) })
	t.Run("none", func(t *testing.T) { refusal(t, s, a.endpoint, nil, tls.VersionTLS13) })
	t.Run("self-signed", func(t *testing.T) { refusal(t, s, a.endpoint, &forged, tls.VersionTLS13) })
	t.Run("TLS 1.2", func(t *testing.T) { refusal(t, s, a.endpoint, &a.cert, tls.VersionTLS12) })
	t.Run("an agent's identity", func(t *testing.T) { refusal(t, s, a.endpoint, &identity, tls.VersionTLS13) })
	t.Run("an agent's identity at the clients' listener", func(t *testing.T) {
		_, err := caller(t, s, s.URL(), &identity).Admin.WhoAmI(t.Context(), &depotv1.WhoAmIRequest{})
		if connect.CodeOf(err) != connect.CodeUnauthenticated || !strings.Contains(err.Error(), "carries no token") {
			t.Errorf("the listener for clients says %v", err)
		}
	})
	t.Run("a client's as a server's", func(t *testing.T) { clientAsServer(t, s, a) })
	t.Run("isolated", func(t *testing.T) {
		_, csr := newKey(t)
		_, err := acquire(t.Context(), apis["a"], &depotv1.AcquireLeaseRequest{
			LeaseId: newID("lse"), Project: &depotv1.ProjectRef{Name: "a"}, Arch: site.NativeArch(), Csr: csr, Launch: true, Isolated: true,
		})
		if connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "runs isolated machines") {
			t.Errorf("an isolated lease: %v", err)
		}
	})
	t.Run("another lease's machine", func(t *testing.T) {
		stopMachine(t, s, a.endpoint.GetMachineId())
		next := newClaim(t, apis["a"], "a")
		if next.endpoint.GetMachineId() == a.endpoint.GetMachineId() {
			t.Fatal("the machine was not replaced")
		}
		refusal(t, s, next.endpoint, &a.cert, tls.VersionTLS13)
		// A certificate names its lease and its machine together: neither the
		// old lease at the new machine nor the new one at B.
		refusal(t, s, b.endpoint, &next.cert, tls.VersionTLS13)
	})
}

func leafOf(t *testing.T, cert tls.Certificate) *x509.Certificate {
	t.Helper()
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return leaf
}

// caller is a client without a token, with an identity or none.
func caller(t *testing.T, s *site.Site, url string, identity *tls.Certificate) *client.Client {
	t.Helper()
	token, err := client.ParseToken(s.AdminToken(t))
	if err != nil {
		t.Fatal(err)
	}
	config := client.Config{URL: url, Pin: token.Pin(), Dial: s.ControlPlaneNet.Dial, Tries: 1}
	if identity != nil {
		config.Identity = new(mtls.Identity)
		if err := config.Identity.Set(*identity); err != nil {
			t.Fatal(err)
		}
	}
	c, err := client.New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// joinAgent joins the control plane as an agent and returns its identity.
func joinAgent(t *testing.T, s *site.Site) tls.Certificate {
	t.Helper()
	token, err := s.Admin(t).Admin.CreateToken(t.Context(), &depotv1.CreateTokenRequest{Kind: "agent", Name: "simulated"})
	if err != nil {
		t.Fatal(err)
	}
	key, csr := newKey(t)
	resp, err := caller(t, s, s.AgentURL(), nil).Agent.Join(t.Context(), &depotv1.JoinRequest{Token: token.GetSecret(), Csr: csr, Name: "simulated"})
	if err != nil {
		t.Fatal(err)
	}
	_, other := newKey(t)
	_, err = caller(t, s, s.AgentURL(), nil).Agent.Join(t.Context(), &depotv1.JoinRequest{Token: token.GetSecret(), Csr: other, Name: "thief"})
	if connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("an agent's token with a second key: %v", err)
	}
	return tls.Certificate{Certificate: resp.GetIdentity().GetChain(), PrivateKey: key}
}

// clientAsServer serves with a client's certificate, and connects to that as a
// driver does.
func clientAsServer(t *testing.T, s *site.Site, c claim) {
	t.Helper()
	l, err := s.ClientNet.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // only accepts
	served := make(chan struct{})
	go func() {
		defer close(served)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		_ = tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{c.cert}, MinVersion: tls.VersionTLS13}).HandshakeContext(t.Context())
		_ = conn.Close()
	}()
	anchors, err := mtls.NewAnchors(c.endpoint.GetTrustAnchors())
	if err != nil {
		t.Fatal(err)
	}
	raw, err := s.ClientNet.Dial(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, mtls.Client{Anchors: anchors, ServerName: c.endpoint.GetServerName()}.Config())
	err = conn.HandshakeContext(t.Context())
	_ = raw.Close()
	<-served
	if err == nil {
		t.Fatal("a client's certificate serves")
	}
	if text := err.Error(); !strings.Contains(text, "certificate") || !strings.Contains(text, c.endpoint.GetServerName()) && !strings.Contains(text, "key usage") {
		t.Errorf("refused by %v", err)
	}
}

// TestEndedLeases ends leases in both ways that a person or program can, while
// a connection is open: it is cut, and the certificate opens nothing more.
func TestEndedLeases(t *testing.T) {
	t.Parallel()
	s := site.New(t, site.Config{})
	s.AddHost(t, site.HostConfig{})
	s.CreateProject(t, "web", nil)
	for name, end := range map[string]func(*testing.T, *client.Client, string, claim){
		"released": func(t *testing.T, api *client.Client, _ string, c claim) {
			t.Helper()
			if _, err := api.Builder.ReleaseLease(t.Context(), &depotv1.ReleaseLeaseRequest{LeaseId: c.id}); err != nil {
				t.Fatal(err)
			}
		},
		"token deleted": func(t *testing.T, api *client.Client, token string, _ claim) {
			t.Helper()
			if _, err := s.Admin(t).Admin.DeleteToken(t.Context(), &depotv1.DeleteTokenRequest{Id: token}); err != nil {
				t.Fatal(err)
			}
			_, err := api.Builder.GetBuilder(t.Context(), &depotv1.GetBuilderRequest{Project: &depotv1.ProjectRef{Name: "web"}})
			if connect.CodeOf(err) != connect.CodeUnauthenticated {
				t.Errorf("the deleted token: %v", err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			made, err := s.Admin(t).Admin.CreateToken(t.Context(), &depotv1.CreateTokenRequest{Kind: "project", Name: name, Project: &depotv1.ProjectRef{Name: "web"}})
			if err != nil {
				t.Fatal(err)
			}
			api := s.API(t, made.GetSecret())
			c := newClaim(t, api, "web")
			conn, err := open(t.Context(), s.ClientNet, c.endpoint, &c.cert, tls.VersionTLS13)
			if err != nil {
				t.Fatal(err)
			}
			end(t, api, made.GetToken().GetId(), c)
			waitCut(t, conn)
			refusal(t, s, c.endpoint, &c.cert, tls.VersionTLS13)
			other := newClaim(t, s.API(t, s.ProjectToken(t, "web")), "web")
			if other.endpoint.GetMachineId() != c.endpoint.GetMachineId() {
				t.Error("the machine did not outlive the lease")
			}
			refusal(t, s, other.endpoint, &c.cert, tls.VersionTLS13)
		})
	}
}

// TestJoinTokenSecondKey is the agent and the machine of a pool, and uses a
// machine's join token with two keys: the machine fails, and its lease is told.
func TestJoinTokenSecondKey(t *testing.T) {
	t.Parallel()
	s := site.New(t, site.Config{})
	identity := joinAgent(t, s)
	agent, machine := caller(t, s, s.AgentURL(), &identity), caller(t, s, s.AgentURL(), nil)
	report := &depotv1.SyncAgentRequest{
		SessionId: "one", Pools: []*depotv1.Pool{{Name: "p", Provider: "local", Arch: site.NativeArch(), MaxMachines: 1}},
	}
	sync := func() *depotv1.SyncAgentResponse {
		t.Helper()
		orders, err := agent.Agent.SyncAgent(t.Context(), report)
		if err != nil {
			t.Fatal(err)
		}
		report.ServerId, report.Epoch, report.HaveRevision = orders.GetServerId(), orders.GetEpoch(), orders.GetRevision()
		return orders
	}
	orders := sync()
	s.CreateProject(t, "web", nil)
	api := s.API(t, s.ProjectToken(t, "web"))
	_, csr := newKey(t)
	told := make(chan error, 1)
	go func() {
		_, err := acquire(t.Context(), api, &depotv1.AcquireLeaseRequest{
			LeaseId: newID("lse"), Project: &depotv1.ProjectRef{Name: "web"}, Arch: site.NativeArch(), Csr: csr, Launch: true,
		})
		told <- err
	}()
	for len(orders.GetMachines()) == 0 {
		orders = sync()
	}
	order := orders.GetMachines()[0]
	register := func(csr []byte) (*depotv1.RegisterResponse, error) {
		return machine.Machine.Register(t.Context(), &depotv1.RegisterRequest{
			MachineId: order.GetId(), JoinToken: order.GetLaunch().GetJoinToken(), Csr: csr,
		})
	}
	key, first := newKey(t)
	registered, err := register(first)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := register(first); err != nil {
		t.Errorf("the same key again: %v", err)
	}
	// What it was given does not let it in where others belong.
	own := tls.Certificate{Certificate: registered.GetIdentity().GetChain(), PrivateKey: key}
	if _, err := caller(t, s, s.AgentURL(), &own).Agent.SyncAgent(t.Context(), &depotv1.SyncAgentRequest{SessionId: "two"}); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("a machine speaks as an agent: %v", err)
	}
	if _, err := caller(t, s, s.URL(), &own).Admin.ListMachines(t.Context(), &depotv1.ListMachinesRequest{}); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("a machine speaks as a client: %v", err)
	}
	_, second := newKey(t)
	if _, err := register(second); connect.CodeOf(err) != connect.CodePermissionDenied || !strings.Contains(err.Error(), "used with another key before") {
		t.Errorf("a second key: %v", err)
	}
	if err := <-told; err == nil || !strings.Contains(err.Error(), order.GetId()) || !strings.Contains(err.Error(), "its join token came with a second key") {
		t.Errorf("the lease was told %v", err)
	}
	got, err := s.Admin(t).Admin.GetMachine(t.Context(), &depotv1.GetMachineRequest{Id: order.GetId()})
	if err != nil || got.GetMachine().GetState() != depotv1.MachineState_MACHINE_STATE_FAILED {
		t.Errorf("the machine is %v, %v", got.GetMachine(), err)
	}
	if _, err := register(first); err == nil {
		t.Error("the failed machine registered again")
	}
	if log := s.ControlPlane.Log(); !strings.Contains(log, "join token used with a second key") || strings.Contains(log, order.GetLaunch().GetJoinToken()) {
		t.Errorf("the log does not tell, or tells the token:\n%s", log)
	}
}

// TestEntitlements builds what needs an entitlement: refused until the project
// has it, and then from the next machine on.
func TestEntitlements(t *testing.T) {
	t.Parallel()
	s, _, home := newProject(t)
	for name, step := range map[string]string{
		"security.insecure": "RUN --security=insecure [\"/bin/busybox\",\"true\"]\n",
		"network.host":      "RUN --network=host [\"/bin/busybox\",\"true\"]\n",
	} {
		dir := site.Context(t, map[string]string{"Dockerfile": base + step})
		r := home.TryBuildx(t, "build", "--progress", "plain", "--allow", name, dir)
		if r.Code != 1 || !strings.Contains(r.Err, name) || !strings.Contains(r.Err, "not allowed") {
			t.Errorf("%s without leave: exit code %d:\n%s", name, r.Code, r.All())
		}
	}
	_, err := s.Admin(t).Admin.UpdateProject(t.Context(), &depotv1.UpdateProjectRequest{
		Project: &depotv1.ProjectRef{Name: "web"}, Settings: &depotv1.ProjectSettings{
			Entitlements: &depotv1.EntitlementList{Names: []string{"security.insecure", "network.host"}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	stopMachine(t, s, s.Machines(t)[0].GetId())
	// A host with cgroup v1 keeps devices from a machine's steps in a way that
	// no privileged step starts there, so the other one is built.
	dir := site.Context(t, map[string]string{"Dockerfile": base + "RUN --network=host [\"/bin/busybox\",\"true\"]\n"})
	home.Buildx(t, "build", "--allow", "network.host", dir)
	// The project's leave is not the build's: that needs --allow as well.
	if r := home.TryBuildx(t, "build", "--progress", "plain", "--no-cache", dir); r.Code != 1 || !strings.Contains(r.Err, "--allow") && !strings.Contains(r.Err, "not allowed") {
		t.Errorf("without --allow: exit code %d:\n%s", r.Code, r.All())
	}
}

// TestDefaultDaemonConfig has a default configuration file of the user's: it is
// ignored, and that is said.
func TestDefaultDaemonConfig(t *testing.T) {
	t.Parallel()
	s := site.New(t, site.Config{})
	s.AddHost(t, site.HostConfig{})
	s.CreateProject(t, "web", nil)
	home := s.NewHome(t, s.ProjectToken(t, "web"))
	file := filepath.Join(home.Docker(), "buildx", "buildkitd.default.toml")
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, file, "insecure-entitlements = [\"security.insecure\"]\n")
	home.CreateBuilder(t, "web")
	dir := site.Context(t, map[string]string{"Dockerfile": base + "RUN --security=insecure [\"/bin/busybox\",\"true\"]\n"})
	r := home.TryBuildx(t, "build", "--allow", "security.insecure", dir)
	if r.Code != 1 || !strings.Contains(r.Err, "not allowed") {
		t.Errorf("exit code %d:\n%s", r.Code, r.All())
	}
	if !strings.Contains(r.Err, "WARNING: the depot driver does not use your buildkitd.toml") {
		t.Errorf("nothing was said of the file:\n%s", r.Err)
	}
}

// TestSecretsStay looks for the secrets of a system at work in logs, arguments,
// files and builders (keys-stay).
func TestSecretsStay(t *testing.T) {
	t.Parallel()
	s, h, home := newProject(t)
	const value = "a-build-secret-of-the-test"
	write(t, filepath.Join(home.Dir, "secret"), value)
	secrets := map[string]string{"the administrator's token": s.AdminToken(t), "the build's secret": value}
	for _, kv := range home.Env {
		if token, ok := strings.CutPrefix(kv, "DEPOT_TOKEN="); ok {
			secrets["the project's token"] = token
		}
	}
	secrets["the agent's token"] = strings.TrimSpace(read(t, filepath.Join(filepath.Dir(h.StateDir), "token")))
	master, err := os.ReadFile(s.ControlPlaneDir() + "-master.key")
	if err != nil {
		t.Fatal(err)
	}
	secrets["the master key"] = strings.TrimSpace(string(master))
	// A private key is one in whatever form it is written.
	secrets["a private key"] = "PRIVATE KEY-----"

	dir := site.Context(t, map[string]string{"Dockerfile": base +
		"RUN --mount=type=secret,id=s [\"/bin/busybox\",\"grep\",\"-q\",\"a-build\",\"/run/secrets/s\"]\nRUN [\"/bin/busybox\",\"sleep\",\"600\"]\n"})
	b := home.StartBuildx(t, "build", "--progress", "plain", "--debug", "--secret", "id=s,src="+filepath.Join(home.Dir, "secret"), dir)
	b.WaitOutput(t, "[base 3/3] RUN")
	for pid, line := range commandLines(t) {
		for what, secret := range secrets {
			if strings.Contains(line, secret) {
				t.Errorf("%s is in the arguments of process %s: %s", what, pid, strings.ReplaceAll(line, "\x00", " "))
			}
		}
	}
	out := b.Interrupt(t).Out
	for what, secret := range secrets {
		for name, text := range map[string]string{"the build's output": out, "the control plane's log": s.ControlPlane.Log(), "the agent's log": h.Agent.Log()} {
			if strings.Contains(text, secret) {
				t.Errorf("%s is in %s", what, name)
			}
		}
	}
	// Each file may hold only what it is for, and be read by root alone.
	own := map[string]string{
		filepath.Join(s.ControlPlaneDir(), "admin-token"): "the administrator's token",
		s.ControlPlaneDir() + "-master.key":               "the master key",
		filepath.Join(filepath.Dir(h.StateDir), "token"):  "the agent's token",
		filepath.Join(h.StateDir, "identity.pem"):         "a private key", // which outlives the agent's process
		filepath.Join(home.Dir, "secret"):                 "the build's secret",
	}
	for _, root := range []string{s.Dir, home.Dir} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil // gone meanwhile
			case err != nil:
				return err
			case d.IsDir() && (d.Name() == "rootfs" || d.Name() == "pool"):
				return fs.SkipDir // programs, and what builds made
			case !d.Type().IsRegular() || d.Name() == "pool.btrfs":
				return nil
			}
			content, err := os.ReadFile(path) //nolint:gosec // below the test's directories
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			for what, secret := range secrets {
				if !bytes.Contains(content, []byte(secret)) {
					continue
				}
				if own[path] != what {
					t.Errorf("%s is in %s", what, path)
				}
				if info, err := d.Info(); err != nil || info.Mode().Perm()&0o077 != 0 {
					t.Errorf("%s can be read by others: %v, %v", path, info.Mode(), err)
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// commandLines are those of all processes, by id.
func commandLines(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	lines := map[string]string{}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil {
			lines[filepath.Base(filepath.Dir(f))] = string(b)
		}
	}
	return lines
}
