package driver

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	bx "github.com/docker/buildx/driver"
	"github.com/google/go-cmp/cmp"
	bkclient "github.com/moby/buildkit/client"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestParseEndpoint(t *testing.T) {
	for text, want := range map[string]struct {
		endpoint Endpoint
		err      string
	}{
		"depot://host/acme/web":           {endpoint: Endpoint{Host: "host", Organization: "acme", Project: "web"}},
		"depot://Host:7080/acme/web/":     {endpoint: Endpoint{Host: "host:7080", Organization: "acme", Project: "web"}},
		"depot://[::1]:70/acme/web/arm64": {endpoint: Endpoint{Host: "[::1]:70", Organization: "acme", Project: "web", Arch: "arm64"}},
		"depot://host/acme/web/s390x":     {err: "neither amd64 nor arm64"},
		"depot://host/web":                {err: "does not name one project"},
		"depot://host/a/b/amd64/d":        {err: "does not name one project"},
		"depot:///acme/web":               {err: "has no host"},
		"https://host/acme/web":           {err: "does not begin with depot://"},
		"depot://t:s@host/acme/web":       {err: "must not carry credentials"},
		"depot://host/acme/web?x":         {err: "more than a path"},
		"":                                {err: "does not begin with depot://"},
	} {
		t.Run(text, func(t *testing.T) {
			got, err := ParseEndpoint(text)
			expect(t, err, want.err)
			if diff := cmp.Diff(want.endpoint, got); diff != "" {
				t.Error(diff)
			}
			if err != nil {
				return
			}
			if again, err := ParseEndpoint(got.String()); err != nil || again != got {
				t.Errorf("%s reads back as %v, %v", got, again, err)
			}
		})
	}
}

func TestBuilds(t *testing.T) {
	for name, tt := range map[string]struct {
		arch string
		p    ocispecs.Platform
		want bool
	}{
		"own":          {arch: "amd64", p: ocispecs.Platform{OS: "linux", Architecture: "amd64"}, want: true},
		"a variant":    {arch: "amd64", p: ocispecs.Platform{OS: "linux", Architecture: "amd64", Variant: "v3"}, want: true},
		"32 bits":      {arch: "amd64", p: ocispecs.Platform{OS: "linux", Architecture: "386"}, want: true},
		"another":      {arch: "amd64", p: ocispecs.Platform{OS: "linux", Architecture: "arm64"}},
		"another OS":   {arch: "amd64", p: ocispecs.Platform{OS: "windows", Architecture: "amd64"}},
		"arm64 v8":     {arch: "arm64", p: ocispecs.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}, want: true},
		"arm is v7":    {arch: "arm64", p: ocispecs.Platform{OS: "linux", Architecture: "arm"}, want: true},
		"arm v6":       {arch: "arm64", p: ocispecs.Platform{OS: "linux", Architecture: "arm", Variant: "v6"}, want: true},
		"arm v5":       {arch: "arm64", p: ocispecs.Platform{OS: "linux", Architecture: "arm", Variant: "v5"}},
		"no such arch": {arch: "vax", p: ocispecs.Platform{OS: "linux", Architecture: "vax"}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := builds(tt.arch, tt.p); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

func TestDriverOpts(t *testing.T) {
	for name, tt := range map[string]struct {
		opts map[string]string
		want string
	}{
		"none":           {},
		"all":            {opts: map[string]string{"isolated": "true", "default-load": "1", "wait-timeout": "5m"}},
		"unknown":        {opts: map[string]string{"cpus": "4"}, want: `driver-opt "cpus" is not known`},
		"a token":        {opts: map[string]string{"token": "x"}, want: "DEPOT_TOKEN"},
		"bad bool":       {opts: map[string]string{"isolated": "perhaps"}, want: "driver-opt isolated=perhaps is not valid"},
		"negative":       {opts: map[string]string{"wait-timeout": "-1s"}, want: "negative"},
		"without a unit": {opts: map[string]string{"wait-timeout": "5"}, want: "not valid"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseDriverOpts(tt.opts)
			expect(t, err, tt.want)
		})
	}
}

func TestResolveNodes(t *testing.T) {
	w := newWorld(t)
	amd, arm := "depot://"+w.host+"/acme/web/amd64", "depot://"+w.host+"/acme/web/arm64"
	type node struct {
		Name, Endpoint string
		Platforms      []string
	}
	both := []node{
		{"amd64-web", amd, platformsOf("amd64")},
		{"arm64-web-emulated", arm, platformsOf("arm64")},
	}
	if runtime.GOARCH == "arm64" {
		both[0], both[1] = both[1], both[0]
	}
	for name, tt := range map[string]struct {
		in      bx.Node
		env     map[string]string
		project string // in depot.json
		want    []node
		err     string
	}{
		"an endpoint":                 {in: bx.Node{Endpoint: "depot://" + w.host + "/acme/web"}, want: both},
		"one architecture":            {in: bx.Node{Endpoint: arm}, want: both[1:]},
		"the default":                 {want: both},
		"the project by variable":     {env: map[string]string{"DEPOT_PROJECT_ID": "acme/web"}, want: both},
		"the project by depot.json":   {project: `{"id": "web"}`, want: both},
		"a variable beats depot.json": {env: map[string]string{"DEPOT_PROJECT_ID": "api"}, project: `{"id": "web"}`, err: `project "acme/api" does not exist`},
		"a given name":                {in: bx.Node{Name: "n", Endpoint: arm}, want: []node{{"n", arm, platformsOf("arm64")}}},
		"a given platform":            {in: bx.Node{Platforms: []string{"linux/386"}}, want: []node{{"amd64-web", amd, []string{"linux/386"}}}},
		"an unknown platform":         {in: bx.Node{Platforms: []string{"linux/s390x"}}, err: "no pool that builds linux/s390x"},
		"a platform too many":         {in: bx.Node{Platforms: []string{"linux/386", "linux/s390x"}}, err: "builds only linux/386 of linux/386, linux/s390x"},
		"an unknown project":          {in: bx.Node{Endpoint: "depot://" + w.host + "/acme/api"}, err: `project "acme/api" does not exist`},
		"a bad depot.json":            {project: `{"id": 7}`, err: "depot.json is not valid"},
		"an empty depot.json":         {project: `{}`, err: "depot.json names no project"},
		"a bad option":                {in: bx.Node{DriverOpts: map[string]string{"x": "y"}}, err: "not known to the depot driver"},
	} {
		t.Run(name, func(t *testing.T) {
			w.factory.opts.Credentials.Dir = t.TempDir()
			if tt.project != "" {
				if err := os.WriteFile(filepath.Join(w.factory.opts.Credentials.Dir, "depot.json"), []byte(tt.project), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			w.factory.opts.Credentials.Env = func(k string) string {
				if v, ok := tt.env[k]; ok {
					return v
				}
				return w.env[k]
			}
			nodes, err := w.factory.ResolveNodes(t.Context(), tt.in)
			expect(t, err, tt.err)
			var got []node
			for _, n := range nodes {
				got = append(got, node{n.Name, n.Endpoint, n.Platforms})
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestExportsOverSeveralNodes(t *testing.T) {
	other := "arm64"
	if runtime.GOARCH == other {
		other = "amd64"
	}
	load := bkclient.ExportEntry{Type: bkclient.ExporterDocker}
	image := bkclient.ExportEntry{Type: bkclient.ExporterImage}
	local := bkclient.ExportEntry{Type: bkclient.ExporterLocal, OutputDir: "out"}
	for name, tt := range map[string]struct {
		arch        string
		defaultLoad bool
		one         bool
		in          []bkclient.ExportEntry
		want        int
		err         string
	}{
		"push and local":         {in: []bkclient.ExportEntry{image, local}, want: 2},
		"load of one":            {one: true, in: []bkclient.ExportEntry{load}, want: 1},
		"load of several":        {in: []bkclient.ExportEntry{load}, err: "--push, or --load with --platform linux/" + runtime.GOARCH},
		"default load, own":      {arch: runtime.GOARCH, defaultLoad: true, in: []bkclient.ExportEntry{load}, want: 1},
		"default load, other":    {arch: other, defaultLoad: true, in: []bkclient.ExportEntry{load}, want: 0},
		"oci":                    {in: []bkclient.ExportEntry{{Type: bkclient.ExporterOCI}}, err: "output type=oci cannot hold"},
		"tar":                    {in: []bkclient.ExportEntry{{Type: bkclient.ExporterTar}}, err: "output type=tar cannot hold"},
		"a docker file":          {in: []bkclient.ExportEntry{{Type: bkclient.ExporterDocker, OutputDir: "d"}}, err: "output type=docker cannot hold"},
		"oci of one is upstream": {one: true, in: []bkclient.ExportEntry{{Type: bkclient.ExporterOCI}}, want: 1},
	} {
		t.Run(name, func(t *testing.T) {
			d := &Driver{endpoint: Endpoint{Arch: tt.arch}, opts: driverOpts{defaultLoad: tt.defaultLoad}}
			got, err := d.exports(tt.in, !tt.one)
			expect(t, err, tt.err)
			if len(got) != tt.want {
				t.Errorf("%d exports are left, want %d", len(got), tt.want)
			}
		})
	}
}

func TestUnmatchedPlatform(t *testing.T) {
	w := newWorld(t)
	d := w.node(t, nil)
	if _, err := d.Info(t.Context()); err != nil {
		t.Fatal(err)
	}
	preparer, ok := d.Driver.(bx.BuildPreparer)
	if !ok {
		t.Fatal("the driver prepares no builds")
	}
	err := preparer.PrepareBuild(t.Context(), &bx.PrepareBuildOptions{
		NoOutput:  true,
		Platforms: []ocispecs.Platform{{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "riscv64"}},
	})
	expect(t, err, "project acme/web has no machine for linux/riscv64: it builds linux/amd64, ")
}
