// Package binfmt lets this host run the programs of another architecture
// through QEMU, for pools that are declared emulated.
//
// A handler of binfmt_misc is state of the whole host, shared with Docker,
// systemd and the distribution's packages. Hence:
//
//   - A handler that serves an architecture already, whoever registered it, is
//     used and left alone.
//   - Ours carry names of our own (depot-aarch64, depot-arm). They are known by
//     them after a restart of the agent, and only they are ever removed.
//   - Several agents of one host may use ours. Each holds a shared lock on
//     binfmt_misc while it does, and whoever can have it alone removes them.
//   - They are registered with the F flag: the kernel keeps QEMU open, so that
//     it works in machines, whose root filesystems have no QEMU.
//
// Handlers do not raise privileges: a setuid program that is emulated runs
// with its caller's (no C flag).
package binfmt

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/agent/provider"
)

// Native reports whether this host runs arch, as Go names it, without QEMU.
func Native(arch string) bool { return arch == runtime.GOARCH }

// Registration tells what serves an architecture on this host.
type Registration struct {
	// Handlers are the names of the handlers in use, others' and ours; none if
	// the architecture is native.
	Handlers []string

	host host
	own  []string
	lock *os.File // held, shared, while ours are used; nil for none
}

// Register sees to it that programs of arch, amd64 or arm64, run on this host,
// along with those of its 32-bit predecessor (linux/386, linux/arm/v7 and v6).
// It is idempotent, and does nothing for a native architecture.
// provider.ErrUnusable means that this host cannot; the message says what to
// install.
func Register(ctx context.Context, arch string) (Registration, error) {
	return host{
		misc:    "/proc/sys/fs/binfmt_misc",
		qemuDir: "/usr/libexec/qemu-binfmt",
		binDir:  "/usr/bin",
	}.register(ctx, arch)
}

// Remove removes the handlers that are ours, unless another agent of this host
// uses them: then that one removes them at its end. Programs that run go on.
// Doing it again does nothing.
func (r Registration) Remove() error {
	if r.lock == nil {
		return nil
	}
	err := unix.Flock(int(r.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	switch {
	case errors.Is(err, unix.EWOULDBLOCK), errors.Is(err, unix.EBADF): // in use, or closed already
		return ignoreClosed(r.lock.Close())
	case err != nil:
		return errors.Join(fmt.Errorf("lock binfmt_misc: %w", err), ignoreClosed(r.lock.Close()))
	}
	var errs []error
	for _, name := range r.own {
		errs = append(errs, r.host.remove(name))
	}
	return errors.Join(append(errs, r.lock.Close())...)
}

func ignoreClosed(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// host is where this kernel and its QEMU are found.
type host struct {
	misc            string // where binfmt_misc is mounted
	qemuDir, binDir string // where interpreters are
}

// target is one kind of program: QEMU's name and the ELF header's fields.
type target struct {
	qemu    string
	class   byte // 1: 32 bits, 2: 64 bits
	machine byte // e_machine, of which the high byte is 0 for all of these
}

func targets(arch string) []target {
	switch arch {
	case "arm64":
		return []target{{"aarch64", 2, 0xb7}, {"arm", 1, 0x28}}
	case "amd64":
		return []target{{"x86_64", 2, 0x3e}, {"i386", 1, 0x03}}
	}
	return nil
}

// Offsets in an ELF header; see elf(5).
const (
	elfClass   = 4
	elfABI     = 7
	elfType    = 16
	elfMachine = 18
	elfLength  = 20
	typeExec   = 2
	typeDyn    = 3
)

// header is the start of a little-endian program of the target.
func (t target) header(elfKind byte) []byte {
	h := make([]byte, elfLength)
	copy(h, "\x7fELF")
	h[elfClass], h[elfClass+1], h[elfClass+2] = t.class, 1, 1
	h[elfType], h[elfMachine] = elfKind, t.machine
	return h
}

// mask leaves open the ABI, which differs between programs, and the bit that
// tells fixed from relocatable ones.
func mask() []byte {
	m := bytes.Repeat([]byte{0xff}, elfLength)
	m[elfABI], m[elfType] = 0, 0xfe
	return m
}

func (t target) name() string { return "depot-" + t.qemu }

func (h host) register(ctx context.Context, arch string) (Registration, error) {
	r := Registration{host: h}
	if Native(arch) {
		return r, nil
	}
	wanted := targets(arch)
	if wanted == nil {
		return r, fmt.Errorf("%w: cannot emulate architecture %q: amd64 and arm64 are known", provider.ErrUnusable, arch)
	}
	if err := h.mount(); err != nil {
		return r, err
	}
	// Before the first look: what is there then stays until this is done.
	lock, err := h.lock()
	if err != nil {
		return r, err
	}
	r.lock = lock
	var fresh []string
	for _, t := range wanted {
		name, made, err := h.serve(ctx, t)
		if made {
			fresh = append(fresh, name)
		}
		if err != nil {
			// All or nothing, but for what an earlier start registered.
			undo := Registration{host: h, own: fresh, lock: lock}
			return Registration{host: h}, errors.Join(fmt.Errorf("emulate %s: %w", arch, err), undo.Remove())
		}
		r.Handlers = append(r.Handlers, name)
		if name == t.name() {
			r.own = append(r.own, name)
		}
	}
	return r, nil
}

// serve returns the name of the handler that serves t, and whether it had to
// be made.
func (h host) serve(ctx context.Context, t target) (name string, made bool, err error) {
	if err := ctx.Err(); err != nil {
		return "", false, err
	}
	handlers, err := h.handlers()
	if err != nil {
		return "", false, err
	}
	if i := slices.IndexFunc(handlers, func(each handler) bool { return each.serves(t) }); i >= 0 {
		return handlers[i].name, false, nil
	}
	// One of ours that does not serve (disabled, say) would be in the way.
	if err := h.remove(t.name()); err != nil {
		return "", false, err
	}
	interpreter, flags, err := h.interpreter(t)
	if err != nil {
		return "", false, err
	}
	line := fmt.Sprintf(":%s:M:0:%s:%s:%s:%s", t.name(), escape(t.header(typeExec)), escape(mask()), interpreter, flags)
	err = os.WriteFile(filepath.Join(h.misc, "register"), []byte(line), 0) // one write, as the kernel wants it
	if errors.Is(err, fs.ErrExist) {
		return t.name(), false, nil // another agent was faster
	}
	if err != nil {
		return "", false, fmt.Errorf("register %s for %s: %w", t.name(), interpreter, err)
	}
	return t.name(), true, nil
}

// interpreter finds QEMU for t, and the flags that fit it.
func (h host) interpreter(t target) (path, flags string, err error) {
	for _, each := range []struct{ path, flags string }{
		// Debian's and Ubuntu's name for a QEMU that is told argv[0] (P).
		{filepath.Join(h.qemuDir, t.qemu+"-binfmt-P"), "OPF"},
		{filepath.Join(h.binDir, "qemu-"+t.qemu+"-static"), "OF"},
	} {
		_, err := os.Stat(each.path)
		if err == nil {
			return each.path, each.flags, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", "", err
		}
	}
	return "", "", fmt.Errorf("%w: no static QEMU for %s on this host: install qemu-user-static "+
		"(apt-get install qemu-user-static), or take the emulated architecture out of the pool", provider.ErrUnusable, t.qemu)
}

// mount makes binfmt_misc visible and checks that it is switched on.
func (h host) mount() error {
	status := filepath.Join(h.misc, "status")
	on, err := os.ReadFile(status) //nolint:gosec // G304: the kernel's file
	if errors.Is(err, fs.ErrNotExist) {
		if err := unix.Mount("binfmt_misc", h.misc, "binfmt_misc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			return fmt.Errorf("%w: cannot mount binfmt_misc at %s: run as root, on a kernel with CONFIG_BINFMT_MISC (modprobe binfmt_misc): %w",
				provider.ErrUnusable, h.misc, err)
		}
		on, err = os.ReadFile(status) //nolint:gosec // G304: the kernel's file
	}
	if err != nil {
		return fmt.Errorf("look at binfmt_misc: %w", err)
	}
	if strings.TrimSpace(string(on)) != "enabled" {
		return fmt.Errorf("%w: binfmt_misc is switched off on this host: echo 1 > %s", provider.ErrUnusable, status)
	}
	return nil
}

// lock takes the shared lock that says that handlers of ours are in use. It is
// on a file of the kernel's that root alone can open, so that nothing is left
// behind and nobody else can hold it; who removes handlers has it for no longer
// than that.
func (h host) lock() (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(h.misc, "register"), os.O_WRONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("lock binfmt_misc: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH); err != nil {
		return nil, errors.Join(fmt.Errorf("lock binfmt_misc: %w", err), f.Close())
	}
	return f, nil
}

// handlers reads what is registered.
func (h host) handlers() ([]handler, error) {
	entries, err := os.ReadDir(h.misc)
	if err != nil {
		return nil, fmt.Errorf("list handlers: %w", err)
	}
	var handlers []handler
	for _, entry := range entries {
		if entry.Name() == "register" || entry.Name() == "status" {
			continue
		}
		text, err := os.ReadFile(filepath.Join(h.misc, entry.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("read handler: %w", err)
		}
		handlers = append(handlers, parseHandler(entry.Name(), string(text)))
	}
	return handlers, nil
}

func (h host) remove(name string) error {
	// Without O_CREATE: what is gone stays gone.
	f, err := os.OpenFile(filepath.Join(h.misc, name), os.O_WRONLY, 0) //nolint:gosec // G304: a name of ours
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove handler %s: %w", name, err)
	}
	_, err = f.WriteString("-1")
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("remove handler %s: %w", name, err)
	}
	return nil
}

// handler is an entry of binfmt_misc.
type handler struct {
	name        string
	enabled     bool
	fixed       bool // F: it works where its interpreter is not in sight
	offset      string
	magic, mask []byte
}

// parseHandler reads an entry as the kernel shows it; see the kernel's
// admin-guide/binfmt-misc. What it does not know it leaves zero.
func parseHandler(name, text string) handler {
	e := handler{name: name}
	var magicErr, maskErr error
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch key {
		case "enabled":
			e.enabled = true
		case "flags:":
			e.fixed = strings.Contains(value, "F")
		case "offset":
			e.offset = value
		case "magic":
			e.magic, magicErr = hex.DecodeString(value)
		case "mask":
			e.mask, maskErr = hex.DecodeString(value)
		}
	}
	if magicErr != nil || maskErr != nil {
		e.magic, e.mask = nil, nil // which serves nothing
	}
	return e
}

// serves reports whether the handler takes every program of t, in machines too.
func (e handler) serves(t target) bool {
	return e.enabled && e.fixed && e.offset == "0" && len(e.magic) > elfMachine &&
		e.matches(t.header(typeExec)) && e.matches(t.header(typeDyn))
}

func (e handler) matches(header []byte) bool {
	if len(e.magic) > len(header) || e.mask != nil && len(e.mask) != len(e.magic) {
		return false
	}
	for i, want := range e.magic {
		bits := byte(0xff)
		if e.mask != nil {
			bits = e.mask[i]
		}
		if header[i]&bits != want&bits {
			return false
		}
	}
	return true
}

// escape writes bytes as the kernel's register file reads them.
func escape(b []byte) string {
	var s strings.Builder
	for _, each := range b {
		fmt.Fprintf(&s, `\x%02x`, each)
	}
	return s.String()
}
