package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/durationpb"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/e2e/site"
)

// state is all that a refused command must not change: what the control plane
// has stored, and the home's builders.
func state(t *testing.T, s *site.Site, home *site.Home) map[string]string {
	t.Helper()
	api, got := s.Admin(t).Admin, map[string]string{}
	projects, err := api.ListProjects(t.Context(), &depotv1.ListProjectsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range projects.GetProjects() {
		got["project "+p.GetId()] = p.GetName()
	}
	tokens, err := api.ListTokens(t.Context(), &depotv1.ListTokensRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range tokens.GetTokens() {
		got["token "+k.GetId()] = k.GetName()
	}
	machines, err := api.ListMachines(t.Context(), &depotv1.ListMachinesRequest{All: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range machines.GetMachines() {
		got["machine "+m.GetId()] = m.GetProject()
	}
	buildx := filepath.Join(home.Docker(), "buildx")
	for _, name := range []string{"instances", "current"} {
		err := filepath.WalkDir(filepath.Join(buildx, name), func(path string, d os.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				got["file "+path] = read(t, path)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return got
}

// change replaces one character of a token's text.
func change(token string, at int) string {
	digit := "a"
	if token[at] == 'a' {
		digit = "b"
	}
	return token[:at] + digit + token[at+1:]
}

// TestRefusedInput gives the commands what is wrong. Each is to end with exit
// code 1 and a message that says what was wrong, and to change nothing.
func TestRefusedInput(t *testing.T) {
	t.Parallel()
	s, _, home := newProject(t)
	s.CreateProject(t, "other", nil)
	token, other := s.ProjectToken(t, "web"), s.ProjectToken(t, "other")
	elsewhere := site.New(t, site.Config{})
	elsewhere.CreateProject(t, "web", nil)
	foreign := elsewhere.ProjectToken(t, "web")
	const pinLen = 52
	unpinned, pin := token[:len(token)-pinLen], token[len(token)-pinLen:]
	dir := site.Context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /\n"})
	broken := t.TempDir()
	write(t, filepath.Join(broken, "depot.json"), `{"id": 7`)
	nameless := t.TempDir()
	write(t, filepath.Join(nameless, "depot.json"), `{"project": "web"}`)
	pages, roots := otherServers(t, s.ClientNet)
	version2 := serveVersion2(t, s.ClientNet, roots)

	build := []string{"build", "--progress", "plain", dir}
	create := func(args ...string) []string {
		return append([]string{"create", "--driver", "depot", "--name", "new"}, args...)
	}
	for name, tt := range map[string]struct {
		args []string
		env  []string
		dir  string
		want []string
		// launches: buildx asks a machine what else it can run, before the
		// driver is asked whether it can.
		launches bool
	}{
		"unknown project":          {args: create(s.Endpoint("nope")), want: []string{`project "default/nope" does not exist`, "docker depot project ls"}},
		"unknown organization":     {args: create("depot://127.0.0.1:8443/nobody/web"), want: []string{`project "nobody/web" does not exist`}},
		"token of another project": {args: build, env: []string{"DEPOT_TOKEN=" + other}, want: []string{`project "default/web" does not exist`}},
		"wrong token":              {args: build, env: []string{"DEPOT_TOKEN=" + change(token, strings.LastIndex(token, "_")+1)}, want: []string{"the token is not known to this server", "log in again"}},
		"expired token":            {args: build, env: []string{"DEPOT_TOKEN=" + expired(t, s)}, want: []string{"expired"}},
		"foreign token":            {args: build, env: []string{"DEPOT_TOKEN=" + foreign[:len(foreign)-pinLen] + pin}, want: []string{"the token is not known to this server", "for another server"}},
		"malformed token":          {args: build, env: []string{"DEPOT_TOKEN=hunter2"}, want: []string{"DEPOT_TOKEN", "depot_<kind>_<id>_<secret>"}},
		"token cut off":            {args: build, env: []string{"DEPOT_TOKEN=" + unpinned[:len(unpinned)-3]}, want: []string{"DEPOT_TOKEN", "cut off"}},
		"no token":                 {args: build, env: []string{"DEPOT_TOKEN="}, want: []string{"not logged in", "docker depot login", "DEPOT_TOKEN"}},
		"pin of another server":    {args: build, env: []string{"DEPOT_TOKEN=" + foreign}, want: []string{"does not carry the pinned certificate", "use a new token"}},
		"no pin and no roots":      {args: build, env: []string{"DEPOT_TOKEN=" + unpinned}, want: []string{"cannot be verified", "pin", "DEPOT_CA_FILE"}},
		"unsupported platform":     {args: append(build, "--platform", "linux/riscv64"), launches: true, want: []string{"no machine for linux/riscv64", "it builds linux/amd64", "choose --platform"}},
		"no pool for arm64":        {args: append(build, "--platform", "linux/arm64"), launches: true, want: []string{"no machine for linux/arm64", "it builds linux/amd64", "docker depot pool ls"}},
		"node without a pool":      {args: create("--platform", "linux/arm64", s.Endpoint("web")), want: []string{"default/web", "no pool", "linux/arm64", "docker depot pool ls"}},
		"unreachable":              {args: create("depot://127.0.0.1:9/default/web"), want: []string{"https://127.0.0.1:9 cannot be reached", "refused"}},
		"name that is none":        {args: create("depot://nowhere.invalid/default/web"), want: []string{"nowhere.invalid"}},
		"server without TLS":       {args: create("depot://" + pages.plain + "/default/web"), want: []string{pages.plain, "TLS"}},
		"pages, not pinned":        {args: create("depot://" + pages.tls + "/default/web"), want: []string{pages.tls, "does not carry the pinned certificate"}},
		"pages": {
			args: create("depot://" + pages.tls + "/default/web"), env: []string{"DEPOT_TOKEN=" + unpinned, "DEPOT_CA_FILE=" + roots.file},
			want: []string{pages.tls, "does not answer like a depot control plane"},
		},
		"server of another version": {
			args: create("depot://" + version2 + "/default/web"), env: []string{"DEPOT_TOKEN=" + unpinned, "DEPOT_CA_FILE=" + roots.file},
			want: []string{`version "1"`, "version 2", "install the same release on both"},
		},
		"malformed depot.json":    {args: create(), dir: broken, want: []string{filepath.Join(broken, "depot.json"), `{"id": "<project>"}`}},
		"depot.json without id":   {args: create(), dir: nameless, want: []string{"names no project", `{"id": "<project>"}`}},
		"unknown driver-opt":      {args: create("--driver-opt", "colour=red", s.Endpoint("web")), want: []string{"colour", "wait-timeout"}},
		"wrong driver-opt":        {args: create("--driver-opt", "wait-timeout=soon", s.Endpoint("web")), want: []string{"wait-timeout=soon"}},
		"token as driver-opt":     {args: create("--driver-opt", "token="+token, s.Endpoint("web")), want: []string{"docker depot login"}},
		"endpoint without scheme": {args: create("127.0.0.1:8443/default/web"), want: []string{"127.0.0.1:8443/default/web", "depot://"}},
		"endpoint of http":        {args: create("https://127.0.0.1:8443/default/web"), want: []string{"depot://host[:port]/organization/project"}},
		"endpoint without host":   {args: create("depot:///default/web"), want: []string{"it has no host"}},
		"endpoint half named":     {args: create("depot://127.0.0.1:8443/default"), want: []string{"it does not name one project"}},
		"endpoint with arch":      {args: create("depot://127.0.0.1:8443/default/web/s390x"), want: []string{"neither amd64 nor arm64"}},
		"endpoint with user":      {args: create("depot://me:secret@127.0.0.1:8443/default/web"), want: []string{"must not carry credentials"}},
		"endpoint with query":     {args: create("depot://127.0.0.1:8443/default/web?x=1"), want: []string{"more than a path"}},
		"isolated":                {args: create("--driver-opt", "isolated=perhaps", s.Endpoint("web")), want: []string{"isolated=perhaps"}},
		"buildkitd flags":         {args: create("--buildkitd-flags", "--debug", s.Endpoint("web")), want: []string{"--buildkitd-flags cannot be used", "docker depot project update"}},
		"buildkitd config":        {args: create("--buildkitd-config", filepath.Join(dir, "Dockerfile"), s.Endpoint("web")), want: []string{"--buildkitd-config cannot be used", "docker depot project update"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := home.With(tt.env...)
			if tt.dir != "" {
				h = h.In(tt.dir)
			}
			before := state(t, s, home)
			r := h.TryBuildx(t, tt.args...)
			if r.Code != 1 {
				t.Errorf("exit code %d, want 1", r.Code)
			}
			for _, w := range tt.want {
				if !strings.Contains(r.Err, w) {
					t.Errorf("the message lacks %q", w)
				}
			}
			if strings.Contains(r.All(), "panic") || strings.Contains(r.All(), "goroutine ") {
				t.Error("it panicked")
			}
			if t.Failed() || testing.Verbose() {
				t.Logf("said:\n%s", r.All())
			}
			after := state(t, s, home)
			if tt.launches {
				withoutMachines(before)
				withoutMachines(after)
			}
			if diff := cmp.Diff(before, after); diff != "" {
				t.Errorf("it changed (-before +after):\n%s", diff)
			}
		})
	}
}

func withoutMachines(state map[string]string) {
	maps.DeleteFunc(state, func(k, _ string) bool { return strings.HasPrefix(k, "machine ") })
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// expired makes a token and waits until it is good no more.
func expired(t *testing.T, s *site.Site) string {
	t.Helper()
	resp, err := s.Admin(t).Admin.CreateToken(t.Context(), &depotv1.CreateTokenRequest{
		Kind: "project", Name: "short", Project: &depotv1.ProjectRef{Name: "web"}, Lifetime: durationpb.New(time.Second),
	})
	if err != nil {
		t.Fatal(err)
	}
	c := s.API(t, resp.GetSecret())
	site.Eventually(t, "the token has expired", func() bool {
		_, err := c.Admin.WhoAmI(t.Context(), &depotv1.WhoAmIRequest{})
		return err != nil
	})
	return resp.GetSecret()
}

// pageServers are servers that are no control planes, as host:port.
type pageServers struct{ plain, tls string }

// authorityFile is a file with a test server's authority.
type authorityFile struct {
	file   string
	server *httptest.Server
}

// otherServers serves pages with and without TLS.
func otherServers(t *testing.T, net *site.Netns) (pageServers, authorityFile) {
	t.Helper()
	pages := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		_, _ = io.WriteString(w, "<html>hello</html>")
	})
	plain, secure := serveIn(t, net, pages), serveIn(t, net, pages)
	plain.Start()
	secure.StartTLS()
	file := filepath.Join(t.TempDir(), "ca.pem")
	write(t, file, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw})))
	return pageServers{plain.Listener.Addr().String(), secure.Listener.Addr().String()}, authorityFile{file, secure}
}

// serveVersion2 serves what a control plane of another protocol version says,
// with the certificate of roots.
func serveVersion2(t *testing.T, net *site.Netns, roots authorityFile) string {
	t.Helper()
	s := serveIn(t, net, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusBadRequest)
		_ = json.NewEncoder(w).Encode(map[string]string{
			"code": "failed_precondition", "message": `this client speaks version "` + r.Header.Get("Depot-Api-Version") +
				`" of the protocol and server 2.0.0 speaks version 2: install the same release on both`,
		})
	}))
	s.TLS = roots.server.TLS.Clone()
	s.StartTLS()
	return s.Listener.Addr().String()
}

// serveIn returns a server that is not started and listens on loopback in a
// namespace.
func serveIn(t *testing.T, net *site.Netns, handler http.Handler) *httptest.Server {
	t.Helper()
	l, err := net.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(handler)
	if err := s.Listener.Close(); err != nil {
		t.Fatal(err)
	}
	s.Listener = l
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	t.Cleanup(s.Close)
	return s
}

// TestProtocolVersion calls the control plane as clients of other versions do.
func TestProtocolVersion(t *testing.T) {
	t.Parallel()
	s := site.New(t, site.Config{})
	calls := &http.Client{Transport: &http.Transport{
		DialContext:     s.ClientNet.Dial,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}, //nolint:gosec // the pin is another test's
	}}
	defer calls.CloseIdleConnections()
	for name, tt := range map[string]struct {
		version, code string
		want          []string
	}{
		"later":     {version: "2", code: "failed_precondition", want: []string{`version "2"`, "speaks version 1", "install the same release"}},
		"none":      {code: "invalid_argument", want: []string{"Depot-Api-Version", "docker depot"}},
		"no number": {version: "one", code: "failed_precondition", want: []string{`version "one"`}},
	} {
		t.Run(name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL()+"/depot.v1.AdminService/WhoAmI", strings.NewReader("{}"))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "application/json")
			req.Header.Set("Authorization", "Bearer "+s.AdminToken(t))
			if tt.version != "" {
				req.Header.Set("Depot-Api-Version", tt.version)
			}
			resp, err := calls.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close() //nolint:errcheck // only read
			var said struct{ Code, Message string }
			if err := json.NewDecoder(resp.Body).Decode(&said); err != nil {
				t.Fatal(err)
			}
			if said.Code != tt.code {
				t.Errorf("code %q, want %q", said.Code, tt.code)
			}
			for _, w := range tt.want {
				if !strings.Contains(said.Message, w) {
					t.Errorf("message %q lacks %q", said.Message, w)
				}
			}
		})
	}
}

// TestPoolFull has more projects than the pool has room for: the second one
// waits and says so, gives up when its user or its timeout says so, and goes
// on when there is room.
func TestPoolFull(t *testing.T) {
	t.Parallel()
	s := site.New(t, site.Config{})
	s.AddHost(t, site.HostConfig{Pools: []string{"arch=" + site.NativeArch() + ",max=1"}})
	homes := map[string]*site.Home{}
	for _, project := range []string{"first", "second"} {
		s.CreateProject(t, project, nil)
		homes[project] = s.NewHome(t, s.ProjectToken(t, project))
		homes[project].CreateBuilder(t, project)
	}
	second := homes["second"]
	long := site.Context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\",\"sleep\",\"600\"]\n"})
	short := site.Context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\nRUN [\"/bin/busybox\",\"true\"]\n"})
	holder := homes["first"].StartBuildx(t, "build", "--progress", "plain", long)
	s.WaitMachines(t, 1)
	const full = "is full (1 of 1 machines run"

	t.Run("timeout", func(t *testing.T) {
		second.Buildx(t, "create", "--driver", "depot", "--name", "hasty", "--driver-opt", "wait-timeout=1s", s.Endpoint("second"))
		r := second.TryBuildx(t, "--builder", "hasty", "build", "--progress", "plain", short)
		if r.Code != 1 || !strings.Contains(r.Err, "got no "+site.NativeArch()+" machine for project default/second within the wait-timeout of 1s") || !strings.Contains(r.Err, full) {
			t.Errorf("exit code %d:\n%s", r.Code, r.All())
		}
	})
	t.Run("Ctrl-C", func(t *testing.T) {
		b := second.StartBuildx(t, "build", "--progress", "plain", short)
		b.WaitOutput(t, full)
		if r := b.Interrupt(t); r.Code == 0 || r.Code == -1 {
			t.Errorf("exit code %d:\n%s", r.Code, r.All())
		}
	})
	t.Run("room", func(t *testing.T) {
		b := second.StartBuildx(t, "build", "--progress", "plain", short)
		b.WaitOutput(t, full)
		holder.Interrupt(t)
		stopMachine(t, s, s.Machines(t)[0].GetId())
		if r := b.Wait(t); r.Code != 0 {
			t.Errorf("exit code %d:\n%s", r.Code, r.All())
		}
		if m := s.Machines(t); len(m) != 1 || m[0].GetProject() != "default/second" {
			t.Errorf("machines %v, want only that of the second project", m)
		}
	})
}

// TestWrongFlags starts the two servers with flags that are wrong. Each says
// which and ends, and has made nothing.
func TestWrongFlags(t *testing.T) {
	t.Parallel()
	bin := site.Bin(t)
	for name, tt := range map[string]struct {
		args []string
		want []string
	}{
		"data-dir not a directory": {[]string{"depot-controlplane", "serve", "--data-dir", "/dev/null"}, []string{"/dev/null"}},
		"client-listen":            {[]string{"depot-controlplane", "serve", "--client-listen", "8443"}, []string{`--client-listen "8443"`, "host:port"}},
		"agent-listen":             {[]string{"depot-controlplane", "serve", "--agent-listen", "here"}, []string{`--agent-listen "here"`, "host:port"}},
		"ops-listen":               {[]string{"depot-controlplane", "serve", "--ops-listen", "0.0.0.0:9"}, []string{`--ops-listen "0.0.0.0:9"`, "loopback"}},
		"tls-cert alone":           {[]string{"depot-controlplane", "serve", "--tls-cert", "/x.pem"}, []string{"--tls-cert and --tls-key"}},
		"tls-cert missing":         {[]string{"depot-controlplane", "serve", "--tls-cert", "/x.pem", "--tls-key", "/y.pem"}, []string{"--tls-cert", "/x.pem"}},
		"master key in the data":   {[]string{"depot-controlplane", "serve", "--master-key-file", "DATA/key"}, []string{"--master-key-file", "DATA/key"}},
		"organization":             {[]string{"depot-controlplane", "serve", "--organization", "no/name"}, []string{"--organization", "no/name"}},
		"listener's address":       {[]string{"depot-controlplane", "serve", "--client-listen", "192.0.2.1:8443"}, []string{"--client-listen", "192.0.2.1:8443"}},
		"log level":                {[]string{"depot-controlplane", "serve", "--log-level", "loud"}, []string{`--log-level "loud"`, "debug"}},
		"log format":               {[]string{"depot-controlplane", "serve", "--log-format", "xml"}, []string{`--log-format "xml"`, "json"}},
		"unknown flag":             {[]string{"depot-controlplane", "serve", "--colour", "red"}, []string{"--colour"}},
		"argument":                 {[]string{"depot-controlplane", "serve", "now"}, []string{"now"}},

		"agent: no server":       {[]string{"depot-agent", "cloud", "--server="}, []string{"--server is missing"}},
		"agent: http":            {[]string{"depot-agent", "cloud", "--server", "http://x"}, []string{"--server", `"http://x"`, "https://x"}},
		"agent: token file":      {[]string{"depot-agent", "cloud", "--token-file", "/nowhere"}, []string{"--token-file", "/nowhere"}},
		"agent: state-dir":       {[]string{"depot-agent", "cloud", "--state-dir", "here"}, []string{`--state-dir "here"`, "absolute"}},
		"agent: run-dir":         {[]string{"depot-agent", "cloud", "--run-dir", "here"}, []string{`--run-dir "here"`, "absolute"}},
		"agent: bin-dir":         {[]string{"depot-agent", "cloud", "--bin-dir", "/nowhere"}, []string{`--bin-dir "/nowhere"`, "buildkitd"}},
		"agent: same dirs":       {[]string{"depot-agent", "cloud", "--state-dir", "DATA", "--run-dir", "DATA"}, []string{"--run-dir", "--state-dir"}},
		"agent: port range":      {[]string{"depot-agent", "cloud", "--port-range", "9-1"}, []string{`--port-range "9-1"`}},
		"agent: pool arch":       {[]string{"depot-agent", "cloud", "--pool", "arch=riscv64"}, []string{"--pool", "riscv64", "amd64"}},
		"agent: pool key":        {[]string{"depot-agent", "cloud", "--pool", "colour=red"}, []string{"--pool", "colour"}},
		"agent: pool max":        {[]string{"depot-agent", "cloud", "--pool", "arch=amd64,max=-1"}, []string{"--pool", "max=-1"}},
		"agent: pool size":       {[]string{"depot-agent", "cloud", "--pool-size", "9lives"}, []string{`--pool-size "9lives"`, "200GiB"}},
		"agent: network":         {[]string{"depot-agent", "cloud", "--network", "fd00::/8"}, []string{`--network "fd00::/8"`, "IPv4"}},
		"agent: allow":           {[]string{"depot-agent", "cloud", "--allow", "my-registry"}, []string{"--allow", "my-registry"}},
		"agent: dns":             {[]string{"depot-agent", "cloud", "--dns", "ns1"}, []string{`--dns "ns1"`}},
		"agent: health address":  {[]string{"depot-agent", "cloud", "--health-address", "0.0.0.0:9"}, []string{`--health-address "0.0.0.0:9"`, "loopback"}},
		"agent: log level":       {[]string{"depot-agent", "cloud", "--log-level", "loud"}, []string{`--log-level "loud"`}},
		"agent: advertised port": {[]string{"depot-agent", "cloud", "--advertise-address", "host:1:2"}, []string{"--advertise-address", "host:1:2"}},
		"agent: unknown flag":    {[]string{"depot-agent", "cloud", "--colour", "red"}, []string{"--colour"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			data := filepath.Join(dir, "data")
			var args []string
			if tt.args[0] == "depot-agent" {
				args = append(args, "--server", "https://127.0.0.1:9", "--state-dir", data, "--run-dir", filepath.Join(dir, "run"), "--health-address", "", "--bin-dir", bin)
			} else {
				args = append(args, "--data-dir", data, "--client-listen", "127.0.0.1:0", "--agent-listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0")
			}
			for _, a := range tt.args[2:] {
				args = append(args, strings.Replace(a, "DATA", data, 1))
			}
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, filepath.Join(bin, tt.args[0]), append(tt.args[1:2], args...)...) //nolint:gosec // the test's own arguments
			cmd.Env, cmd.Dir = site.Environ(), dir
			out, err := cmd.CombinedOutput()
			if err == nil || cmd.ProcessState.ExitCode() != 1 {
				t.Errorf("%v, want exit code 1", err)
			}
			for _, w := range tt.want {
				if !strings.Contains(string(out), strings.Replace(w, "DATA", data, 1)) {
					t.Errorf("the message lacks %q", w)
				}
			}
			if t.Failed() || testing.Verbose() {
				t.Logf("said:\n%s", out)
			}
			// A listener's address may be there at the next start, which then finds
			// what this one has made.
			if left, _ := os.ReadDir(data); len(left) > 0 && name != "listener's address" {
				t.Errorf("it made %v", left)
			}
		})
	}
}
