package local

import (
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
