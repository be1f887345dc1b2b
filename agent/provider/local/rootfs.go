package local

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Where a machine finds what is made for it alone. The root filesystem holds
// empty files to mount these on.
const (
	resolvConf = "/etc/resolv.conf"
	// CNIConfig is where a machine finds the network configuration of its RUN
	// steps, and CNIBin where the plugins are that it names.
	CNIConfig = "/etc/buildkit/cni.conflist"
	CNIBin    = "/opt/cni/bin"
)

// tree is a root filesystem to be, by path from its root.
type tree map[string]entry

// entry is one thing in a tree: a link, a file with content, a copy of a file
// of the host, or, if it is none of these, a directory.
type entry struct {
	mode fs.FileMode
	link string
	data []byte
	src  string
	file bool
}

func (t tree) dir(path string, mode fs.FileMode) { t[path] = entry{mode: mode} }
func (t tree) symlink(path, target string)       { t[path] = entry{link: target} }
func (t tree) write(path string, content string) {
	t[path] = entry{mode: 0o644, data: []byte(content), file: true}
}

func (t tree) copy(path, src string, mode fs.FileMode) {
	t[merged(path)] = entry{mode: mode, src: src, file: true}
}

// merged moves what belongs under /usr there: the tree's /bin, /sbin and /lib
// are links, as distributions have them now, so that a path works either way.
func merged(path string) string {
	for _, dir := range []string{"/bin/", "/sbin/", "/lib/", "/lib64/"} {
		if strings.HasPrefix(path, dir) {
			return "/usr" + path
		}
	}
	return path
}

// program copies a program of the host with its libraries.
func (t tree) program(l loader, path, src string) error {
	t.copy(path, src, 0o755)
	libraries, err := l.closure(src)
	if err != nil {
		return err
	}
	for _, lib := range libraries {
		t.copy(lib, lib, 0o755)
	}
	return nil
}

// plan lists all that a machine's root filesystem holds.
func plan(ctx context.Context, binaries, authorities string) (tree, error) {
	t := skeleton()
	l := hostLoader()
	for dir, names := range map[string][]string{
		"/usr/bin": {"depot-agent", "buildkitd", "buildkit-runc"},
		CNIBin:     {"bridge", "loopback", "host-local"},
	} {
		for _, name := range names {
			src := filepath.Join(binaries, name)
			if _, err := os.Stat(src); err != nil {
				return nil, fmt.Errorf("root filesystem: %w: build the programs into %s first", err, binaries)
			}
			if err := t.program(l, filepath.Join(dir, name), src); err != nil {
				return nil, fmt.Errorf("root filesystem: %w", err)
			}
		}
	}
	if err := t.git(ctx, l); err != nil {
		return nil, fmt.Errorf("root filesystem: %w", err)
	}
	if err := t.certificates(authorities); err != nil {
		return nil, fmt.Errorf("root filesystem: %w", err)
	}
	return t, nil
}

func skeleton() tree {
	t := tree{}
	for _, dir := range []string{
		"/dev", "/etc/ssl/certs", "/opt", "/proc", "/root", "/run", "/sys", "/usr/bin", "/usr/lib", "/usr/lib64", "/usr/sbin", "/var/lib/buildkit",
		"/usr/share/git-core/templates", filepath.Dir(CNIConfig), CNIBin,
	} {
		t.dir(dir, 0o755)
	}
	t.dir("/tmp", fs.ModeSticky|0o777)
	for _, name := range []string{"bin", "sbin", "lib", "lib64"} {
		t.symlink("/"+name, "usr/"+name)
	}
	t.symlink("/var/run", "/run")
	t.symlink("/var/tmp", "/tmp")
	t.write("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
	t.write("/etc/group", "root:x:0:\nnogroup:x:65534:\n")
	t.write("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
	t.write("/etc/hosts", "127.0.0.1 localhost\n")
	t.write(resolvConf, "")
	t.write(CNIConfig, "")
	return t
}

// git copies git with what fetching over HTTPS and SSH and submodules need. The
// submodule command is a shell script, and git runs its ssh command by a shell.
func (t tree) git(ctx context.Context, l loader) error {
	for _, name := range []string{"git", "ssh", "sh", "basename", "cat", "expr", "sed", "uname"} {
		src, err := exec.LookPath(name)
		if err != nil {
			return fmt.Errorf("%s is not on this host: install git, openssh-client and the usual commands of a shell", name)
		}
		if err := t.program(l, "/usr/bin/"+name, src); err != nil {
			return err
		}
	}
	out, err := exec.CommandContext(ctx, "git", "--exec-path").Output()
	if err != nil {
		return fmt.Errorf("ask git for its own directory: %w", err)
	}
	dir := strings.TrimSpace(string(out))
	if !exists(filepath.Join(dir, "git-remote-http")) {
		return fmt.Errorf("git on this host cannot fetch over HTTPS: %s has no git-remote-http", dir)
	}
	for _, name := range []string{"git-remote-http", "git-submodule", "git-sh-setup", "git-sh-i18n", "git-sh-i18n--envsubst"} {
		src := filepath.Join(dir, name)
		if !exists(src) {
			continue // later versions of git have these built in
		}
		if err := t.program(l, src, src); err != nil {
			return err
		}
	}
	t.symlink(merged(filepath.Join(dir, "git")), "/usr/bin/git")
	t.symlink(merged(filepath.Join(dir, "git-remote-https")), "git-remote-http")
	t.byName(l)
	return nil
}

// byName copies the libraries that C libraries load by name, and that the
// programs do not list: for looking up names, and for ending threads.
func (t tree) byName(l loader) {
	for _, name := range []string{"libnss_files.so.2", "libnss_dns.so.2", "libresolv.so.2", "libgcc_s.so.1"} {
		for _, dir := range l.dirs {
			if src := filepath.Join(dir, name); exists(src) {
				t.copy(src, src, 0o755)
				break
			}
		}
	}
}

// certificates copies the host's bundle, with the authorities in the named file
// if there is one, to where Go, git and curl look for it on any distribution.
func (t tree) certificates(authorities string) error {
	const bundle = "/etc/ssl/certs/ca-certificates.crt"
	for _, src := range []string{bundle, "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem"} {
		if !exists(src) {
			continue
		}
		t.copy(bundle, src, 0o644)
		if authorities != "" {
			both, err := joinCertificates(src, authorities)
			if err != nil {
				return err
			}
			t.write(bundle, both)
		}
		if src != bundle {
			t.symlink(src, bundle)
		}
		return nil
	}
	return errors.New("this host has no bundle of CA certificates: install ca-certificates")
}

// joinCertificates returns the certificates of a bundle and of another file,
// which has to hold some.
func joinCertificates(bundle, authorities string) (string, error) {
	more, err := os.ReadFile(authorities) //nolint:gosec // the operator names it
	if err != nil {
		return "", fmt.Errorf("certificates for machines: %w", err)
	}
	if !x509.NewCertPool().AppendCertsFromPEM(more) {
		return "", fmt.Errorf("certificates for machines: %s holds no certificate in PEM", authorities)
	}
	all, err := os.ReadFile(bundle) //nolint:gosec // one of the known places
	if err != nil {
		return "", fmt.Errorf("certificates for machines: %w", err)
	}
	return string(all) + "\n" + string(more), nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// hash names the tree by its content.
func (t tree) hash() (string, error) {
	h := sha256.New()
	for _, path := range slices.Sorted(maps.Keys(t)) {
		e := t[path]
		if _, err := fmt.Fprintf(h, "%q %o %q %q ", path, e.mode, e.link, e.data); err != nil {
			return "", err
		}
		if e.src == "" {
			continue
		}
		if err := pour(h, e.src); err != nil {
			return "", fmt.Errorf("hash root filesystem: %w", err)
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:16]), nil
}

func pour(w io.Writer, src string) error {
	f, err := os.Open(src) //nolint:gosec // G304: a program of the host's
	if err != nil {
		return err
	}
	_, err = io.Copy(w, f)
	return errors.Join(err, f.Close())
}

// assemble makes the tree under root, whole and on disk, or not at all.
func (t tree) assemble(ctx context.Context, root string) error {
	if exists(root) {
		return nil
	}
	tmp, err := os.MkdirTemp(filepath.Dir(root), partial)
	if err != nil {
		return fmt.Errorf("assemble root filesystem: %w", err)
	}
	if err := t.fill(ctx, tmp); err != nil {
		return fmt.Errorf("assemble root filesystem: %w", errors.Join(err, os.RemoveAll(tmp)))
	}
	if err := os.Rename(tmp, root); err != nil {
		return fmt.Errorf("assemble root filesystem: %w", err)
	}
	return syncDir(filepath.Dir(root))
}

// partial begins the names of trees that are not complete.
const partial = ".partial-"

func (t tree) fill(ctx context.Context, root string) error {
	if err := os.Chmod(root, 0o755); err != nil { //nolint:gosec // G302: a root directory is readable by all
		return err
	}
	for _, path := range slices.Sorted(maps.Keys(t)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := t[path].make(filepath.Join(root, path)); err != nil {
			return err
		}
	}
	// Libraries may come from directories that the loader knows only by its
	// cache. Without ldconfig there is no cache to be had, nor needed.
	if ldconfig, err := exec.LookPath("ldconfig"); err == nil {
		conf := strings.Join(hostLoader().dirs, "\n") + "\n"
		if err := os.WriteFile(filepath.Join(root, "etc/ld.so.conf"), []byte(conf), 0o644); err != nil { //nolint:gosec // G306: read by all
			return err
		}
		if err := run(ctx, "", ldconfig, "-X", "-r", root); err != nil {
			return err
		}
	}
	// The name says what is inside; that must be true after a power cut as well.
	d, err := os.Open(root) //nolint:gosec // G304: a directory of the provider's
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(d.Fd())), d.Close())
}

func (e entry) make(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { //nolint:gosec // G301: a root filesystem is readable by all
		return err
	}
	switch {
	case e.link != "":
		return os.Symlink(e.link, path)
	case !e.file:
		if err := os.MkdirAll(path, 0o755); err != nil { //nolint:gosec // G301: as above
			return err
		}
	case e.src == "":
		if err := os.WriteFile(path, e.data, e.mode.Perm()); err != nil {
			return err
		}
	default:
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, e.mode.Perm()) //nolint:gosec // G304: below a directory of the provider's
		if err != nil {
			return err
		}
		if err := errors.Join(pour(f, e.src), f.Close()); err != nil {
			return err
		}
	}
	return os.Chmod(path, e.mode)
}

// prune removes the root filesystems that are not in use, and partial ones.
func prune(dir string, used []string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("remove old root filesystems: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if !slices.Contains(used, e.Name()) {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}
