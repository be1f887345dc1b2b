package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParsePools(t *testing.T) {
	tests := map[string]struct {
		texts []string
		want  []poolConfig
		err   string
	}{
		"default":       {nil, []poolConfig{{name: "local-amd64", arch: "amd64", max: 4}}, ""},
		"all fields":    {[]string{"name=fast,arch=amd64,max=7"}, []poolConfig{{name: "fast", arch: "amd64", max: 7}}, ""},
		"emulated":      {[]string{"arch=arm64,emulated"}, []poolConfig{{name: "local-arm64", arch: "arm64", max: 4, emulated: true}}, ""},
		"foreign":       {[]string{"arch=arm64"}, nil, "this host is amd64 and cannot run arm64 natively"},
		"needless":      {[]string{"arch=amd64,emulated"}, nil, `leave out "emulated"`},
		"twice":         {[]string{"arch=amd64", "arch=amd64"}, nil, "another pool named local-amd64"},
		"unknown arch":  {[]string{"arch=riscv64"}, nil, `"riscv64" is not known`},
		"no arch":       {[]string{"max=3"}, nil, "give arch=amd64 or arch=arm64"},
		"unknown field": {[]string{"arch=amd64,gpu=1"}, nil, `"gpu=1" is not known`},
		"no machines":   {[]string{"arch=amd64,max=0"}, nil, "max=0 is not valid"},
		"bad name":      {[]string{"arch=amd64,name=a b"}, nil, `the name "a b" is not valid`},
		"empty":         {[]string{""}, nil, `"" is not known`},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := parsePools(test.texts, "amd64", 4)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Fatalf("the error is %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(poolConfig{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestParseBytes(t *testing.T) {
	for text, want := range map[string]int64{
		"": 0, "1GiB": 1 << 30, "200GiB": 200 << 30, "2TiB": 2 << 40, "1073741824": 1 << 30, "4096MiB": 4 << 30,
		"1": -1, "1MiB": -1, "-1GiB": -1, "GiB": -1, "1GB": -1, "1 GiB": -1, "99999999999TiB": -1, "x": -1,
	} {
		got, ok := parseBytes(text)
		if ok != (want >= 0) || ok && got != want {
			t.Errorf("%q is %d, %v", text, got, ok)
		}
	}
}

// Bad values end the program before it touches the host, and are all named.
func TestBadValues(t *testing.T) {
	tokenFile := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(tokenFile, []byte("secret-text"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		args []string
		env  map[string]string
		want []string
	}{
		"no server": {nil, nil, []string{"--server is missing"}},
		"no TLS":    {[]string{"--server", "http://h:1"}, nil, []string{"speaks TLS only"}},
		"many at once": {
			[]string{"--server", "https://h:1", "--port-range", "9-1", "--pool-size", "3", "--dns", "x", "--allow", "127.0.0.1", "--network", "::/0", "--health-address", "0.0.0.0:1", "--state-dir", "rel"},
			nil,
			[]string{`--port-range "9-1"`, `--pool-size "3"`, `--dns "x"`, "--allow", `--network "::/0"`, `--health-address "0.0.0.0:1"`, `--state-dir "rel"`},
		},
		"from the environment":     {nil, map[string]string{"DEPOT_AGENT_SERVER": "https://h:1", "DEPOT_AGENT_POOL": "arch=mips arch=s390x"}, []string{`"mips"`, `"s390x"`}},
		"token in the environment": {[]string{"--server", "https://h:1"}, map[string]string{"DEPOT_AGENT_TOKEN": "secret-text"}, []string{"DEPOT_AGENT_TOKEN: the token has not the form"}},
		"token file":               {[]string{"--server", "https://h:1", "--token-file", tokenFile}, nil, []string{"--token-file " + tokenFile}},
		"log format":               {[]string{"--server", "https://h:1", "--log-format", "xml"}, nil, []string{`--log-format "xml"`}},
		"unknown flag":             {[]string{"--gpu"}, nil, []string{"unknown flag: --gpu"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			state := filepath.Join(t.TempDir(), "state")
			var out bytes.Buffer
			err := execute(context.WithoutCancel(t.Context()), world{
				args: append([]string{"cloud", "--state-dir", state}, test.args...),
				lookup: func(name string) (string, bool) {
					v, ok := test.env[name]
					return v, ok
				},
				out: &out, errOut: &out, version: "1",
			})
			if err == nil {
				t.Fatal("it started")
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q is missing in: %v", want, err)
				}
			}
			if strings.Contains(err.Error()+out.String(), "secret-text") {
				t.Error("the token's text is shown")
			}
			if _, err := os.Stat(state); err == nil {
				t.Error("the state directory was made")
			}
		})
	}
}
