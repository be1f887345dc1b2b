package local

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRootfs runs what was copied from the host where only the copies are.
func TestRootfs(t *testing.T) {
	r := newRig(t)
	r.launch(t, specA())
	for name, test := range map[string]struct{ script, want string }{
		"git":              {"git --version", "git version"},
		"git over HTTPS":   {"git ls-remote https://127.0.0.1:1/x 2>&1 || exit 0", "unable to access 'https://127.0.0.1:1/x/'"},
		"ssh":              {"ssh -V 2>&1", "OpenSSH"},
		"submodules":       {"cd /tmp && git init -q x && cd x && git submodule update --init && echo fine", "fine"},
		"buildkitd":        {"buildkitd --version", "buildkit"},
		"buildkit-runc":    {"buildkit-runc --version", "runc version"},
		"CNI plugins":      {CNIBin + "/bridge 2>&1 || exit 0", "CNI"},
		"certificates":     {"cat /etc/ssl/certs/ca-certificates.crt", "BEGIN CERTIFICATE"},
		"nameservers":      {"cat /etc/resolv.conf", "nameserver " + serverAddr},
		"fuse":             {"test -c /dev/fuse && echo fine", "fine"},
		"read-only root":   {"echo x >/etc/passwd || echo fine", "fine"},
		"the host's knobs": {"echo 1 >/proc/sys/kernel/panic || echo fine", "fine"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := output(t, "runc", "--root", r.runcDir(), "exec", machineA, "sh", "-c", test.script); !strings.Contains(got, test.want) {
				t.Errorf("got %.500q, want %q", got, test.want)
			}
		})
	}
}

// TestJoinCertificates refuses files that would leave machines without the
// certificates that somebody meant to give them.
func TestJoinCertificates(t *testing.T) {
	const bundle = "/etc/ssl/certs/ca-certificates.crt"
	file := func(content string) string {
		path := filepath.Join(t.TempDir(), "more.pem")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil { //nolint:gosec // in the test's directory
			t.Fatal(err)
		}
		return path
	}
	all, err := os.ReadFile(bundle)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct{ file, err string }{
		"certificates": {file: file(string(all))},
		"missing":      {file: "/nonexistent.pem", err: "certificates for machines: open /nonexistent.pem"},
		"no PEM":       {file: file("hello"), err: "holds no certificate in PEM"},
		"a key":        {file: file("-----BEGIN PRIVATE KEY-----\naGVsbG8=\n-----END PRIVATE KEY-----\n"), err: "holds no certificate in PEM"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := joinCertificates(bundle, test.file)
			if test.err == "" && (err != nil || !strings.HasPrefix(got, string(all)) || len(got) < 2*len(all)) {
				t.Errorf("got %d bytes and %v, want both files", len(got), err)
			}
			if test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)) {
				t.Errorf("got the error %v, want %q", err, test.err)
			}
		})
	}
}
