package binfmt

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/agent/provider"
)

const misc = "/proc/sys/fs/binfmt_misc"

// TestMain runs the tests with a binfmt_misc of their own, which Linux 6.7 and
// later keep per user namespace, so that they neither see nor touch the host's.
// Older kernels have the host's only: there the tests have it one at a time.
func TestMain(m *testing.M) {
	const private = "-depot.private"
	if os.Args[len(os.Args)-1] == private {
		os.Args = os.Args[:len(os.Args)-1]
		if err := hideHost(); err != nil {
			panic(err)
		}
		m.Run()
		return
	}
	if privatePossible() {
		run := exec.Command(os.Args[0], append(os.Args[1:], private)...) //nolint:gosec,noctx // G204: this test binary; it ends with its tests
		run.Stdin, run.Stdout, run.Stderr = os.Stdin, os.Stdout, os.Stderr
		run.SysProcAttr = namespaces()
		if err := run.Run(); err != nil {
			panic(err)
		}
		return
	}
	lock, err := os.OpenFile(filepath.Join(os.TempDir(), "depot-binfmt-test.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		panic(err)
	}
	m.Run()
}

func namespaces() *syscall.SysProcAttr {
	self := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1 << 16}}
	return &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS, UidMappings: self, GidMappings: self,
	}
}

func privatePossible() bool {
	try := exec.Command("mount", "-t", "binfmt_misc", "binfmt_misc", "/mnt") //nolint:noctx // ends at once
	try.SysProcAttr = namespaces()
	return try.Run() == nil
}

// hideHost covers the host's binfmt_misc by nothing: Register has to mount ours.
func hideHost() error {
	return unix.Mount("tmpfs", misc, "tmpfs", 0, "")
}

func foreign() (arch string, goarchs []string) {
	if runtime.GOARCH == "arm64" {
		return "amd64", []string{"amd64", "386"}
	}
	return "arm64", []string{"arm64", "arm"}
}

func names(t *testing.T) []string {
	t.Helper()
	handlers, err := host{misc: misc}.handlers()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, each := range handlers {
		names = append(names, each.name)
	}
	return names
}

func register(t *testing.T, arch string) Registration {
	t.Helper()
	r, err := Register(t.Context(), arch)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Remove(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func TestProgramsRun(t *testing.T) {
	arch, goarchs := foreign()
	register(t, arch)
	source := filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(source, []byte("package main\n\nimport \"runtime\"\n\nfunc main() { println(runtime.GOARCH) }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, goarch := range goarchs {
		t.Run(goarch, func(t *testing.T) {
			// A root without QEMU, as a machine's.
			root := t.TempDir()
			build := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(root, "program"), source) //nolint:gosec // G204: the test's own directory
			build.Env = append(build.Environ(), "CGO_ENABLED=0", "GOARCH="+goarch, "GOFLAGS=-mod=mod", "GOARM=7")
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			program := exec.CommandContext(t.Context(), "/program")
			program.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
			out, err := program.CombinedOutput()
			if err != nil || strings.TrimSpace(string(out)) != goarch {
				t.Errorf("the program printed %q, %v; want %s", out, err, goarch)
			}
		})
	}
}

func TestRegister(t *testing.T) {
	arch, _ := foreign()
	before := names(t)
	first := register(t, arch)
	if len(first.Handlers) != 2 {
		t.Errorf("served by %q, want two handlers", first.Handlers)
	}
	registered := names(t)
	// An agent that was started again finds its own, and can remove it.
	second := register(t, arch)
	if diff := cmp.Diff([][]string{first.Handlers, first.own}, [][]string{second.Handlers, second.own}); diff != "" {
		t.Errorf("registered again (-first +second):\n%s", diff)
	}
	if diff := cmp.Diff(registered, names(t)); diff != "" {
		t.Errorf("registering again changed handlers:\n%s", diff)
	}
	// Two agents use them: the first to go leaves them to the other.
	for range 2 {
		if err := first.Remove(); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff(registered, names(t)); diff != "" {
		t.Errorf("one of two agents removed what the other uses (-before +after):\n%s", diff)
	}
	for range 2 {
		if err := second.Remove(); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff(before, names(t)); diff != "" {
		t.Errorf("left behind (-before +after):\n%s", diff)
	}
}

func TestOthersAreUsedAndLeft(t *testing.T) {
	arch, _ := foreign()
	wanted := targets(arch)[0]
	h := host{misc: misc, qemuDir: "/usr/libexec/qemu-binfmt", binDir: "/usr/bin"}
	if err := h.mount(); err != nil {
		t.Fatal(err)
	}
	interpreter, _, err := h.interpreter(wanted)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		flags string
		used  bool
	}{
		"that work in machines":    {"OF", true},
		"that do not work in them": {"O", false},
	} {
		t.Run(name, func(t *testing.T) {
			const other = "test-other"
			line := fmt.Sprintf(":%s:M::%s:%s:%s:%s", other, escape(wanted.header(typeExec)), escape(mask()), interpreter, c.flags)
			if err := os.WriteFile(filepath.Join(misc, "register"), []byte(line), 0); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := h.remove(other); err != nil {
					t.Error(err)
				}
			})
			r := register(t, arch)
			want := wanted.name()
			if c.used {
				want = other
			}
			if r.Handlers[0] != want {
				t.Errorf("served by %s, want %s", r.Handlers[0], want)
			}
			if err := r.Remove(); err != nil {
				t.Error(err)
			}
			if left := strings.Join(names(t), " "); !strings.Contains(left, other) || strings.Contains(left, wanted.name()) {
				t.Errorf("after Remove there is %s, want only what others registered", left)
			}
		})
	}
}

func TestDisabledOwnIsReplaced(t *testing.T) {
	arch, _ := foreign()
	r := register(t, arch)
	if err := os.WriteFile(filepath.Join(misc, r.own[0]), []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	again := register(t, arch)
	if diff := cmp.Diff(r.Handlers, again.Handlers); diff != "" {
		t.Errorf("registered again (-first +second):\n%s", diff)
	}
	text, err := os.ReadFile(filepath.Join(misc, r.own[0]))
	if err != nil || !parseHandler("", string(text)).enabled {
		t.Errorf("the handler is not enabled: %s %v", text, err)
	}
}

func TestRefusals(t *testing.T) {
	arch, _ := foreign()
	before := names(t)
	empty := host{misc: misc, qemuDir: t.TempDir(), binDir: t.TempDir()}
	_, err := empty.register(t.Context(), arch)
	if !errors.Is(err, provider.ErrUnusable) || !strings.Contains(err.Error(), "qemu-user-static") {
		t.Errorf("without QEMU: %v, want ErrUnusable that names the package", err)
	}
	// Only the 64-bit one is there: nothing may stay of it.
	wanted := targets(arch)[0]
	interpreter, _, err := host{qemuDir: "/usr/libexec/qemu-binfmt", binDir: "/usr/bin"}.interpreter(wanted)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(interpreter, filepath.Join(empty.binDir, "qemu-"+wanted.qemu+"-static")); err != nil {
		t.Fatal(err)
	}
	if _, err := empty.register(t.Context(), arch); !errors.Is(err, provider.ErrUnusable) {
		t.Errorf("with half of QEMU: %v, want ErrUnusable", err)
	}
	if _, err := Register(t.Context(), "pdp11"); !errors.Is(err, provider.ErrUnusable) {
		t.Errorf("an unknown architecture: %v, want ErrUnusable", err)
	}
	if r, err := Register(t.Context(), runtime.GOARCH); err != nil || len(r.Handlers) > 0 {
		t.Errorf("the native architecture: %v, %v; want nothing done", r.Handlers, err)
	}
	if diff := cmp.Diff(before, names(t)); diff != "" {
		t.Errorf("left behind (-before +after):\n%s", diff)
	}
}

func TestServes(t *testing.T) {
	t.Parallel()
	const good = "enabled\ninterpreter /usr/bin/qemu-aarch64-static\nflags: POF\noffset 0\n" +
		"magic 7f454c460201010000000000000000000200b700\nmask ffffffffffffff00fffffffffffffffffeffffff\n"
	arm64 := targets("arm64")
	for name, c := range map[string]struct {
		text   string
		target target
		want   bool
	}{
		"serves":              {good, arm64[0], true},
		"another target":      {good, arm64[1], false},
		"disabled":            {strings.Replace(good, "enabled", "disabled", 1), arm64[0], false},
		"not fixed":           {strings.Replace(good, "POF", "PO", 1), arm64[0], false},
		"fixed programs only": {strings.Replace(good, "fffeff", "ffffff", 1), arm64[0], false},
		"every ELF program":   {"enabled\nflags: F\noffset 0\nmagic 7f454c46\n", arm64[0], false},
		"by file name":        {"enabled\ninterpreter /x\nflags: F\nextension .exe\n", arm64[0], false},
		"damaged":             {strings.Replace(good, "mask ff", "mask f", 1), arm64[0], false},
		"empty":               {"", arm64[0], false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if got := parseHandler("x", c.text).serves(c.target); got != c.want {
				t.Errorf("serves: %v, want %v", got, c.want)
			}
		})
	}
}
