package e2e

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/opendepot/depot/e2e/site"
)

// whichDockerfile leaves in /which the platform of the machine that ran the
// step, what the program was compiled for, and what the kernel said.
const whichDockerfile = `FROM scratch AS base
ARG TARGETPLATFORM BUILDPLATFORM
COPY ${TARGETPLATFORM}/which /bin/which
RUN ["/bin/which", "/which"]
FROM base AS linked
FROM scratch AS app
COPY --from=linked /which /which
`

// ran is what /which holds for each platform. The kernel tells a 32-bit program
// that it runs natively of the machine's own architecture.
func ran() map[string]string {
	is386, isARM := "i686", "armv7l"
	if site.NativeArch() == "amd64" {
		is386 = "x86_64"
	} else {
		isARM = "aarch64"
	}
	return map[string]string{
		"linux/amd64":  "linux/amd64 amd64 x86_64\n",
		"linux/386":    "linux/amd64 386 " + is386 + "\n",
		"linux/arm64":  "linux/arm64 arm64 aarch64\n",
		"linux/arm/v7": "linux/arm64 armv7 " + isARM + "\n",
		"linux/arm/v6": "linux/arm64 armv6 " + isARM + "\n",
	}
}

// TestPlatforms builds for several platforms on a host with two pools, one of
// them emulated.
func TestPlatforms(t *testing.T) {
	t.Parallel()
	s := site.New(t, site.Config{})
	s.AddPeerAddress(t)
	s.StartRegistry(t)
	site.CheckEmulation(t)
	s.AddHost(t, site.HostConfig{
		Pools: []string{"arch=" + site.NativeArch(), "arch=" + site.EmulatedArch() + ",emulated"},
		Flags: []string{"--allow", site.RegistryAddress},
	})
	s.CreateProject(t, "web", nil)
	home := s.NewHome(t, s.ProjectToken(t, "web"))
	home.CreateBuilder(t, "web")
	dir := whichContext(t)

	t.Run("push", func(t *testing.T) {
		ref := site.RegistryAddress + "/one:latest"
		r := home.Buildx(t, "build", "--progress", "plain", "--platform", "linux/amd64,linux/arm64", "-t", ref,
			"--push", "--output", "type=image,registry.insecure=true", dir)
		wantPlatforms(t, s, "one", "linux/amd64", "linux/arm64")
		for _, line := range []string{
			"[depot] waiting for " + "an " + site.NativeArch() + " machine\n",
			"[depot] waiting for " + "an " + site.EmulatedArch() + " machine (emulated)\n",
		} {
			if !strings.Contains(r.All(), line) {
				t.Errorf("progress does not say %q:\n%s", line, r.All())
			}
		}
	})
	t.Run("bake", func(t *testing.T) { bakePlatforms(t, s, home, dir) })
	t.Run("predecessors", func(t *testing.T) {
		out := filepath.Join(t.TempDir(), "out")
		home.Buildx(t, "build", "--platform", "linux/386,linux/arm/v7,linux/arm/v6", "-o", out, dir)
		for _, platform := range []string{"linux/386", "linux/arm/v7", "linux/arm/v6"} {
			if got := read(t, filepath.Join(out, strings.ReplaceAll(platform, "/", "_"), "which")); got != ran()[platform] {
				t.Errorf("%s was built by %q, want %q", platform, got, ran()[platform])
			}
		}
	})
	t.Run("outputs", func(t *testing.T) { refuseOutputs(t, home, dir) })
	t.Run("unmatched", func(t *testing.T) {
		for name, platforms := range map[string]string{"alone": "linux/s390x", "with another": "linux/amd64,linux/s390x"} {
			r := home.TryBuildx(t, "build", "--progress", "plain", "--platform", platforms, dir)
			if r.Code != 1 || !strings.Contains(r.Err, "project default/web has no machine for linux/s390x: it builds linux/amd64,") ||
				strings.Contains(r.Err, "[base ") {
				t.Errorf("%s: exit code %d:\n%s", name, r.Code, r.All())
			}
		}
	})
	t.Run("both nodes", func(t *testing.T) {
		// Each machine keeps its half of a build, under the same reference.
		halves := map[string]int{}
		for ref := range strings.FieldsSeq(home.Buildx(t, "history", "ls", "--format", "{{.Ref}}").Out) {
			halves[ref[strings.LastIndexByte(ref, '/')+1:]]++
		}
		for ref, n := range halves {
			if n != 2 {
				t.Errorf("history has %d halves of build %s, want 2", n, ref)
			}
		}
		if len(halves) != 4 { // push, two of bake, predecessors
			t.Errorf("history has %v, want 4 builds", halves)
		}
		home.Buildx(t, "prune", "--all", "--force")
		if out := home.Buildx(t, "du").Out; total(out) != "0B" {
			t.Errorf("prune left:\n%s", out)
		}
	})
	t.Run("listings", func(t *testing.T) { listEmulated(t, s, home) })
	t.Run("default load", func(t *testing.T) { loadOwn(t, s, home, dir) })
}

// listEmulated finds the word wherever the emulated architecture is listed,
// and nowhere else.
func listEmulated(t *testing.T, s *site.Site, home *site.Home) {
	t.Helper()
	admin := s.NewHome(t, s.AdminToken(t))
	for what, lines := range map[string]string{
		"pool ls":    admin.Depot(t, "pool", "ls", "--format", "{{.Arch}}").Out,
		"machine ls": admin.Depot(t, "machine", "ls", "--format", "{{.Arch}}").Out,
	} {
		got := strings.Fields(strings.ReplaceAll(lines, " (", "("))
		slices.Sort(got)
		want := []string{site.NativeArch(), site.EmulatedArch() + "(emulated)"}
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s lists %v, want %v", what, got, want)
		}
	}
	if out := admin.Depot(t, "pool", "ls").All(); !strings.Contains(out, "emulated: "+site.EmulatedArch()+" runs on "+site.NativeArch()+" through QEMU") {
		t.Errorf("pool ls does not warn:\n%s", out)
	}
	for _, args := range [][]string{{"ls"}, {"inspect", "depot"}} {
		if out := home.TryBuildx(t, args...).Out; !strings.Contains(out, site.EmulatedArch()+"-web-emulated") ||
			strings.Contains(out, site.NativeArch()+"-web-emulated") {
			t.Errorf("%v does not say which node is emulated:\n%s", args, out)
		}
	}
}

// loadOwn builds for both architectures with a builder that loads by default:
// the engine gets the image of its own.
func loadOwn(t *testing.T, s *site.Site, home *site.Home, dir string) {
	t.Helper()
	home = home.With("DOCKER_HOST=" + s.StartEngine(t).Host)
	home.Buildx(t, "create", "--driver", "depot", "--name", "loads", "--driver-opt", "default-load=true", s.Endpoint("web"))
	for _, test := range []struct {
		tag   string
		flags []string
	}{
		{"plain", nil},
		{"both", []string{"--platform", "linux/amd64,linux/arm64"}},
		{"other", []string{"--platform", "linux/" + site.EmulatedArch()}},
	} {
		r := home.Buildx(t, append([]string{"build", "--builder", "loads", "--progress", "plain", "-t", test.tag, dir}, test.flags...)...)
		said := strings.Contains(r.All(), "[depot] not loading linux/"+site.EmulatedArch()+": the local engine gets "+site.NativeArch()+" only")
		if said != (test.tag == "both") {
			t.Errorf("%s: said %t that one is not loaded:\n%s", test.tag, said, r.All())
		}
		want := site.NativeArch()
		if test.tag == "other" {
			want = site.EmulatedArch()
		}
		if got := home.CLI(t, "image", "inspect", "--format", "{{.Architecture}}", test.tag).Out; got != want+"\n" {
			t.Errorf("%s: the engine has %q, want %q", test.tag, got, want)
		}
	}
	own := "linux/" + site.NativeArch() + "," + map[string]string{"amd64": "linux/386", "arm64": "linux/arm/v7"}[site.NativeArch()]
	r := home.TryBuildx(t, "build", "--builder", "loads", "--progress", "plain", "-t", "two", "--platform", own, dir)
	if r.Code != 1 || !strings.Contains(r.Err, "Use --push, load one --platform alone, or give the engine the containerd image store") {
		t.Errorf("two platforms: exit code %d:\n%s", r.Code, r.All())
	}
}

// TestOnePool has a host with one pool: one node, and every command of
// buildx's that asks all nodes works.
func TestOnePool(t *testing.T) {
	t.Parallel()
	s := site.New(t, site.Config{})
	s.AddPeerAddress(t)
	s.StartRegistry(t)
	s.AddHost(t, site.HostConfig{Flags: []string{"--allow", site.RegistryAddress}})
	s.CreateProject(t, "web", nil)
	home := s.NewHome(t, s.ProjectToken(t, "web"))
	home.CreateBuilder(t, "web")
	dir := site.Context(t, map[string]string{"Dockerfile": dockerfile, "message": "one\n"})

	nodes := home.Buildx(t, "inspect", "depot").Out
	if n := strings.Count(nodes, "Endpoint:"); n != 1 || !strings.Contains(nodes, "/default/web/"+site.NativeArch()+"\n") {
		t.Errorf("%d nodes, want one for %s:\n%s", n, site.NativeArch(), nodes)
	}
	if m := s.Machines(t); len(m) != 0 {
		t.Errorf("inspect launched %v", m)
	}
	home.Buildx(t, "build", "--progress", "plain", "-t", site.RegistryAddress+"/app", "--push", "--output", "type=image,registry.insecure=true", dir)
	t.Run("du", func(t *testing.T) {
		if out := home.Buildx(t, "du").Out; total(out) == "0B" {
			t.Errorf("du shows no cache:\n%s", out)
		}
	})
	t.Run("history", func(t *testing.T) {
		ref := strings.TrimSpace(home.Buildx(t, "history", "ls", "--format", "{{.Ref}}").Out)
		if ref == "" || strings.Contains(ref, "\n") {
			t.Fatalf("history has %q, want the one build", ref)
		}
		ref = ref[strings.LastIndexByte(ref, '/')+1:]
		if out := home.Buildx(t, "history", "inspect", ref).Out; !strings.Contains(out, "Build Steps:\t10/10 (0% cached)") {
			t.Errorf("history inspect:\n%s", out)
		}
		if r := home.Buildx(t, "history", "logs", "--progress", "plain", ref); !strings.Contains(r.All(), "RUN cat /message /machine") {
			t.Errorf("history logs:\n%s", r.All())
		}
	})
	t.Run("dial-stdio", func(t *testing.T) { dialStdio(t, home) })
	t.Run("imagetools", func(t *testing.T) {
		// By loopback, for buildx itself speaks to a registry by HTTP only there.
		home.Buildx(t, "imagetools", "create", "-t", "127.0.0.1:5000/copy", "127.0.0.1:5000/app")
		if out := home.Buildx(t, "imagetools", "inspect", "127.0.0.1:5000/copy").Out; !strings.Contains(out, "linux/"+site.NativeArch()) {
			t.Errorf("imagetools inspect:\n%s", out)
		}
	})
	t.Run("other platform", func(t *testing.T) {
		other := "linux/" + site.EmulatedArch()
		r := home.TryBuildx(t, "build", "--progress", "plain", "--platform", other, dir)
		if r.Code != 1 || !strings.Contains(r.Err, "project default/web has no machine for "+other+": it builds linux/"+site.NativeArch()) {
			t.Errorf("exit code %d:\n%s", r.Code, r.All())
		}
	})
	t.Run("without a machine", func(t *testing.T) {
		stopMachine(t, s, s.Machines(t)[0].GetId())
		if out := home.Buildx(t, "du").Out; total(out) == "0B" {
			t.Errorf("the cache did not outlive the machine:\n%s", out)
		}
		if out := home.Buildx(t, "history", "ls").Out; strings.Count(out, "Completed") != 1 {
			t.Errorf("the history did not outlive the machine:\n%s", out)
		}
	})
	t.Run("prune", func(t *testing.T) {
		home.Buildx(t, "prune", "--all", "--force")
		if out := home.Buildx(t, "du").Out; total(out) != "0B" {
			t.Errorf("prune left:\n%s", out)
		}
		if r := home.Buildx(t, "build", "--progress", "plain", dir); strings.Contains(r.All(), "CACHED") {
			t.Errorf("a step was cached after prune:\n%s", r.All())
		}
	})
}

// total is what `du` says that all records take; 0B if it does not say.
func total(du string) string {
	_, size, _ := strings.Cut(du, "Total:")
	if fields := strings.Fields(size); len(fields) > 0 {
		return fields[0]
	}
	return "0B"
}

// bakePlatforms bakes two targets, of which one is the other's context, for
// both architectures.
func bakePlatforms(t *testing.T, s *site.Site, home *site.Home, dir string) {
	t.Helper()
	bake := `group "default" { targets = ["two", "three"] }
target "_all" { platforms = ["linux/amd64", "linux/arm64"] }
target "two" {
  inherits = ["_all"]
  target = "base"
  tags = ["` + site.RegistryAddress + `/two:latest"]
  output = ["type=image,push=true,registry.insecure=true"]
}
target "three" {
  inherits = ["_all"]
  contexts = { linked = "target:two" }
  tags = ["` + site.RegistryAddress + `/three:latest"]
  output = ["type=image,push=true,registry.insecure=true"]
}
`
	file := filepath.Join(t.TempDir(), "docker-bake.hcl")
	if err := os.WriteFile(file, []byte(bake), 0o600); err != nil {
		t.Fatal(err)
	}
	home.In(dir).Buildx(t, "bake", "-f", file)
	for _, repository := range []string{"two", "three"} {
		wantPlatforms(t, s, repository, "linux/amd64", "linux/arm64")
	}
}

// refuseOutputs asks for what several machines cannot give, and is told what
// to ask for instead.
func refuseOutputs(t *testing.T, home *site.Home, dir string) {
	t.Helper()
	for output, way := range map[string]string{
		"type=oci,dest=x":    "use --push or --output type=local",
		"type=tar,dest=x":    "use --push or --output type=local",
		"type=docker,dest=x": "use --push or --output type=local",
		"type=docker":        "use --push, or --load with --platform linux/" + site.NativeArch() + " alone",
	} {
		r := home.TryBuildx(t, "build", "--progress", "plain", "--platform", "linux/amd64,linux/arm64", "-t", "x", "-o", output, dir)
		if r.Code != 1 || !strings.Contains(r.Err, way) {
			t.Errorf("--output %s: exit code %d, want 1 and %q:\n%s", output, r.Code, way, r.All())
		}
		if _, err := os.Stat(filepath.Join(home.Dir, "x")); err == nil {
			t.Errorf("--output %s left a file", output)
		}
	}
}

// whichContext is a context with the program which for all platforms.
func whichContext(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for platform := range ran() {
		compile(t, "./testdata/which", filepath.Join(dir, platform, "which"), platform)
	}
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(whichDockerfile), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// compile builds a static program of the test's data for a platform.
func compile(t *testing.T, source, output, platform string) {
	t.Helper()
	parts := strings.Split(platform, "/")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", output, source) //nolint:gosec // the test's own arguments
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+parts[0], "GOARCH="+parts[1])
	if len(parts) > 2 {
		cmd.Env = append(cmd.Env, "GOARM="+strings.TrimPrefix(parts[2], "v"))
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("compile %s for %s: %v\n%s", source, platform, err, out)
	}
}

// wantPlatforms checks that an image of the site's registry is for exactly
// these platforms, by its index and its configurations, and that each was made
// where it should.
func wantPlatforms(t *testing.T, s *site.Site, repository string, platforms ...string) {
	t.Helper()
	var index ocispecs.Index
	fetchJSON(t, s, repository, "manifests/latest", &index)
	got := map[string]bool{}
	for _, m := range index.Manifests {
		if m.Platform == nil || m.Platform.OS == "unknown" {
			continue // an attestation
		}
		var manifest ocispecs.Manifest
		fetchJSON(t, s, repository, "manifests/"+m.Digest.String(), &manifest)
		var config ocispecs.Image
		fetchJSON(t, s, repository, "blobs/"+manifest.Config.Digest.String(), &config)
		platform := strings.TrimSuffix(config.OS+"/"+config.Architecture+"/"+config.Variant, "/")
		got[platform] = true
		layers := manifest.Layers
		which := untar(t, fetch(t, s, repository, "blobs/"+layers[len(layers)-1].Digest.String()))["which"]
		if which != ran()[platform] {
			t.Errorf("%s of %s was built by %q, want %q", platform, repository, which, ran()[platform])
		}
	}
	for _, p := range platforms {
		if !got[p] || len(got) != len(platforms) {
			t.Errorf("index of %s has %v, want %v", repository, got, platforms)
			break
		}
	}
}

// fetch gets a manifest or blob from the site's registry.
func fetch(t *testing.T, s *site.Site, repository, what string) []byte {
	t.Helper()
	return get(t, s.HostNet, "http://"+site.RegistryAddress+"/v2/"+repository+"/"+what)
}

// get gets what an address in a network namespace has.
func get(t *testing.T, from *site.Netns, url string) []byte {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: from.Dial, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", ocispecs.MediaTypeImageIndex+", "+ocispecs.MediaTypeImageManifest+", */*")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close() //nolint:errcheck // only read
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s %v\n%s", url, resp.Status, err, body)
	}
	return body
}

func fetchJSON(t *testing.T, s *site.Site, repository, what string, into any) {
	t.Helper()
	if err := json.Unmarshal(fetch(t, s, repository, what), into); err != nil {
		t.Fatalf("%s of %s: %v", what, repository, err)
	}
}

// untar returns the regular files of an archive, compressed or not, by name.
func untar(t *testing.T, archive []byte) map[string]string {
	t.Helper()
	var r io.Reader = strings.NewReader(string(archive))
	if gz, err := gzip.NewReader(strings.NewReader(string(archive))); err == nil {
		r = gz
	}
	files := map[string]string{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatalf("read archive: %v", err)
		}
		if h.Typeflag == tar.TypeReg {
			content, err := io.ReadAll(tr)
			if err != nil {
				t.Fatalf("read archive: %v", err)
			}
			files[strings.TrimPrefix(h.Name, "./")] = string(content)
		}
	}
}
