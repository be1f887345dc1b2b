package e2e

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io/fs"
	"net"
	"net/http"
	"net/http/cgi" //nolint:gosec // G504 is about Go before 1.6.3
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	bkclient "github.com/moby/buildkit/client"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/opendepot/depot/e2e/site"
)

// inputsDockerfile shows all that a build is given besides its context.
const inputsDockerfile = `FROM scratch AS base
COPY busybox sshkeys /bin/
RUN ["/bin/busybox","--install","-s","/bin"]
WORKDIR /out
FROM base AS inputs
ARG GREETING=none
RUN echo "$GREETING" > arg
COPY --from=extra /named named
RUN --mount=type=secret,id=password cp /run/secrets/password secret
RUN --mount=type=ssh sshkeys keys
RUN <<END
printf heredoc > heredoc
printf ' of two lines' >> heredoc
END
COPY <<END copied
copied heredoc
END
FROM scratch
COPY --from=inputs /out /
`

// newPeerProject is newProject with an address that machines reach, and a
// registry there.
func newPeerProject(t *testing.T) (*site.Site, *site.Home) {
	t.Helper()
	s := site.New(t, site.Config{})
	s.AddPeerAddress(t)
	s.StartRegistry(t)
	s.AddHost(t, site.HostConfig{Flags: []string{"--allow", site.PeerAddress}})
	s.CreateProject(t, "web", nil)
	home := s.NewHome(t, s.ProjectToken(t, "web"))
	home.CreateBuilder(t, "web")
	return s, home
}

// TestOutputs asks for each output that one machine can give.
func TestOutputs(t *testing.T) {
	t.Parallel()
	s, home := newPeerProject(t)
	dir := site.Context(t, map[string]string{"Dockerfile": dockerfile, "message": "one\n"})
	home = home.In(t.TempDir())
	build := func(args ...string) site.Result {
		return home.Buildx(t, append([]string{"build", "--progress", "plain", dir}, args...)...)
	}
	file := func(name string) []byte { return []byte(read(t, filepath.Join(home.Work, name))) }

	t.Run("local", func(t *testing.T) {
		build("-o", "out")
		if got := string(file("out/result")); !strings.HasPrefix(got, "one\n") {
			t.Errorf("result is %q", got)
		}
	})
	t.Run("tar", func(t *testing.T) {
		build("-o", "type=tar,dest=out.tar")
		if got := untar(t, file("out.tar"))["result"]; !strings.HasPrefix(got, "one\n") {
			t.Errorf("result is %q", got)
		}
		if got := untar(t, []byte(build("-o", "-").Out))["result"]; !strings.HasPrefix(got, "one\n") {
			t.Errorf("result on standard output is %q", got)
		}
	})
	t.Run("oci", func(t *testing.T) {
		build("-o", "type=oci,dest=oci.tar")
		if files := untar(t, file("oci.tar")); files["oci-layout"] == "" || files["index.json"] == "" {
			t.Error("oci.tar is no OCI layout")
		}
	})
	t.Run("docker", func(t *testing.T) {
		build("-t", "x", "-o", "type=docker,dest=docker.tar")
		if got := untar(t, file("docker.tar"))["manifest.json"]; !strings.Contains(got, `"x:latest"`) {
			t.Errorf("docker.tar has the manifest %q", got)
		}
	})
	t.Run("push", func(t *testing.T) {
		build("-t", site.RegistryAddress+"/app", "--push", "--output", "type=image,registry.insecure=true",
			"--metadata-file", "metadata.json", "--iidfile", "iid", "--provenance", "mode=max")
		var index ocispecs.Index
		fetchJSON(t, s, "app", "manifests/latest", &index)
		var metadata struct {
			Digest string `json:"containerimage.digest"`
			Ref    string `json:"buildx.build.ref"`
		}
		if err := json.Unmarshal(file("metadata.json"), &metadata); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(metadata.Ref, "depot/"+site.NativeArch()+"-web/") {
			t.Errorf("metadata has the ref %q", metadata.Ref)
		}
		if iid := string(file("iid")); iid != metadata.Digest || !strings.HasPrefix(iid, "sha256:") {
			t.Errorf("iidfile has %q, the metadata %q", iid, metadata.Digest)
		}
		fetch(t, s, "app", "manifests/"+metadata.Digest)
		if p := attestation(t, s, "app", index, "https://slsa.dev/provenance/"); !strings.Contains(p, "cat /message /machine") {
			t.Errorf("the provenance does not tell the steps:\n%s", p)
		}
	})
	t.Run("rawjson", func(t *testing.T) {
		r := home.Buildx(t, "build", "--progress", "rawjson", "-o", "type=cacheonly", dir)
		for line := range strings.Lines(r.Err) {
			if !json.Valid([]byte(line)) {
				t.Errorf("not JSON: %s", line)
			}
		}
		if !strings.Contains(r.Err, `[app 2/3] COPY message /message`) {
			t.Errorf("rawjson:\n%s", r.Err)
		}
	})
}

// attestation returns the first attestation of a kind that an image comes with.
func attestation(t *testing.T, s *site.Site, repository string, index ocispecs.Index, predicate string) string {
	t.Helper()
	for _, m := range index.Manifests {
		if m.Annotations["vnd.docker.reference.type"] != "attestation-manifest" {
			continue
		}
		var manifest ocispecs.Manifest
		fetchJSON(t, s, repository, "manifests/"+m.Digest.String(), &manifest)
		for _, l := range manifest.Layers {
			if strings.HasPrefix(l.Annotations["in-toto.io/predicate-type"], predicate) {
				return string(fetch(t, s, repository, "blobs/"+l.Digest.String()))
			}
		}
	}
	t.Errorf("image %s has no attestation %s: %v", repository, predicate, index.Manifests)
	return ""
}

// TestInputs gives builds more than a directory.
func TestInputs(t *testing.T) {
	t.Parallel()
	s, home := newPeerProject(t)
	t.Run("beside the context", func(t *testing.T) { buildInputs(t, home) })
	t.Run("git", func(t *testing.T) { buildGit(t, s, home) })
}

// buildInputs gives a build a secret, an SSH agent, a named context, arguments
// and heredocs.
func buildInputs(t *testing.T, home *site.Home) {
	t.Helper()
	dir := site.Context(t, map[string]string{"Dockerfile": inputsDockerfile})
	extra := site.Context(t, map[string]string{"named": "from a named context\n"})
	compile(t, "./testdata/sshkeys", filepath.Join(dir, "sshkeys"), "linux/"+site.NativeArch())
	socket, key := startSSHAgent(t, home)
	out := filepath.Join(t.TempDir(), "out")
	home.With("PASSWORD=from the environment").Buildx(t, "build", "--progress", "plain", "--build-arg", "GREETING=hello",
		"--secret", "id=password,env=PASSWORD", "--ssh", "default="+socket, "--build-context", "extra="+extra, "-o", out, dir)
	for name, want := range map[string]string{
		"arg": "hello\n", "named": "from a named context\n", "secret": "from the environment",
		"heredoc": "heredoc of two lines", "copied": "copied heredoc\n",
	} {
		if got := read(t, filepath.Join(out, name)); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if keys := read(t, filepath.Join(out, "keys")); !strings.Contains(keys, key) {
		t.Errorf("the step saw the keys %q, want %q", keys, key)
	}
}

// startSSHAgent starts an agent with one key, and returns its socket and the
// key's public half as the protocol has it.
func startSSHAgent(t *testing.T, home *site.Home) (socket, key string) {
	t.Helper()
	dir := t.TempDir()
	socket, file := filepath.Join(dir, "agent"), filepath.Join(dir, "key")
	agent := exec.CommandContext(t.Context(), "ssh-agent", "-D", "-a", socket) //nolint:gosec // in the test's directory
	if err := agent.Start(); err != nil {
		t.Fatalf("start ssh-agent: %v", err)
	}
	t.Cleanup(func() { _ = agent.Wait() }) // the test's context has ended it
	site.Eventually(t, "the SSH agent listens", func() bool {
		info, err := os.Stat(socket)
		return err == nil && info.Mode().Type() == fs.ModeSocket
	})
	home.Run(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file)
	home.With("SSH_AUTH_SOCK="+socket).Run(t, "ssh-add", "-q", file)
	blob, err := base64.StdEncoding.DecodeString(strings.Fields(read(t, file+".pub"))[1])
	if err != nil {
		t.Fatal(err)
	}
	return socket, string(blob)
}

// buildGit builds from a repository that the machine fetches, and from one
// branch's directory of it.
func buildGit(t *testing.T, s *site.Site, home *site.Home) {
	t.Helper()
	url := serveGit(t, s, home, site.Context(t, map[string]string{
		"Dockerfile":       dockerfile,
		"message":          "from git\n",
		"below/Dockerfile": "FROM scratch\nCOPY here /result\n",
		"below/here":       "from below\n",
	}))
	for where, want := range map[string]string{url: "from git\n", url + "#main:below": "from below\n"} {
		out := filepath.Join(t.TempDir(), "out")
		home.Buildx(t, "build", "--progress", "plain", "-o", out, where)
		if got := read(t, filepath.Join(out, "result")); !strings.HasPrefix(got, want) {
			t.Errorf("context %s gave %q, want %q", where, got, want)
		}
	}
}

// serveGit commits a directory and serves it where machines reach it.
func serveGit(t *testing.T, s *site.Site, home *site.Home, dir string) (url string) {
	t.Helper()
	git := home.In(dir).With("GIT_AUTHOR_NAME=e2e", "GIT_AUTHOR_EMAIL=e2e@example.com", "GIT_COMMITTER_NAME=e2e", "GIT_COMMITTER_EMAIL=e2e@example.com")
	git.Run(t, "git", "init", "--quiet", "--initial-branch", "main")
	git.Run(t, "git", "add", ".")
	git.Run(t, "git", "commit", "--quiet", "--message", "all")
	backend := &cgi.Handler{
		Path: filepath.Join(strings.TrimSpace(git.Run(t, "git", "--exec-path").Out), "git-http-backend"),
		Env:  []string{"GIT_PROJECT_ROOT=" + dir, "GIT_HTTP_EXPORT_ALL=1", "HOME=" + home.Dir},
	}
	const address = site.PeerAddress + ":5001"
	listener, err := s.HostNet.Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: backend, ReadHeaderTimeout: time.Minute}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(listener)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-served
	})
	return "http://" + address + "/.git"
}

// TestCacheExport carries a cache from one project to another, through a
// directory and through a registry.
func TestCacheExport(t *testing.T) {
	t.Parallel()
	s, home := newPeerProject(t)
	s.CreateProject(t, "other", nil)
	other := s.NewHome(t, s.ProjectToken(t, "other"))
	other.CreateBuilder(t, "other")
	dir := site.Context(t, map[string]string{"Dockerfile": dockerfile, "message": "one\n"})
	local := filepath.Join(t.TempDir(), "cache")
	for name, test := range map[string]struct{ to, from string }{
		"local": {"type=local,mode=max,dest=" + local, "type=local,src=" + local},
		"registry": {
			"type=registry,mode=max,registry.insecure=true,ref=" + site.RegistryAddress + "/cache",
			"type=registry,registry.insecure=true,ref=" + site.RegistryAddress + "/cache",
		},
	} {
		t.Run(name, func(t *testing.T) {
			home.Buildx(t, "build", "--progress", "plain", "--cache-to", test.to, dir)
			r := other.Buildx(t, "build", "--progress", "plain", "--cache-from", test.from, dir)
			wantCached(t, 6, r)
			other.Buildx(t, "prune", "--all", "--force")
		})
	}
}

// dialStdio speaks to the machine's buildkitd through the command's standard
// streams, as a client on another host does by SSH.
func dialStdio(t *testing.T, home *site.Home) {
	t.Helper()
	cmd := home.Command(t.Context(), filepath.Join(site.Bin(t), "docker-buildx"), "dial-stdio")
	ours, theirs := socketPair(t)
	var log bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()   //nolint:errcheck // it ends with the connection
	defer ours.Close() //nolint:errcheck // and that with the test
	_ = theirs.Close()
	c, err := bkclient.New(t.Context(), "", bkclient.WithContextDialer(func(context.Context, string) (net.Conn, error) { return ours, nil }))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // the test is over
	workers, err := c.ListWorkers(t.Context())
	if err != nil || len(workers) != 1 || workers[0].Platforms[0].Architecture != site.NativeArch() {
		t.Fatalf("workers %v, %v:\n%s", workers, err, log.String())
	}
}

// socketPair returns the two ends of a connection.
func socketPair(t *testing.T) (net.Conn, *os.File) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours := os.NewFile(uintptr(fds[0]), "ours")
	defer ours.Close() //nolint:errcheck // the connection has its own descriptor
	conn, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	return conn, os.NewFile(uintptr(fds[1]), "theirs")
}
