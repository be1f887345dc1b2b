// Package host runs a control plane and a cloud agent on this host, in the
// background, for `docker depot up` and `down`.
//
// It needs root, and gives it to the agent alone: the control plane runs under
// a user of its own. What it started it finds again by pid files that also
// hold the process's start time. Everything is in two directories, the data
// directory on a disk and the run directory in memory:
//
//	<data>/controlplane  the control plane's database
//	<data>/keys          its master key, which backups of the database lack
//	<data>/agent         the agent's identity, records and volumes
//	<data>/log           what both say
//	<run>                pid files, and the machines' run-time state
//
// Machines belong to neither process: ending them is the control plane's to
// order, before [Config.StopAgent].
package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultUser is whom the control plane runs as.
const DefaultUser = "depot"

// Times that are waited.
const (
	readyTimeout = 60 * time.Second
	stopTimeout  = 20 * time.Second
	pollEvery    = 50 * time.Millisecond
)

// The programs.
const (
	controlPlaneProgram = "depot-controlplane"
	agentProgram        = "depot-agent"
)

// Config is where things are and how they listen.
type Config struct {
	// DataDir and RunDir are absolute.
	DataDir, RunDir string
	// BinDir has the programs; empty means: look in Search, then on PATH.
	BinDir string
	// Search are directories to look for the programs in.
	Search []string
	// Address is what the control plane listens on, and machines too.
	Address string
	// The ports; on loopback those for health.
	ClientPort, AgentPort, OpsPort, HealthPort int
	// PortRange is first-last, for machines; empty means the agent's default.
	PortRange string
	// Pools are the agent's --pool values.
	Pools []string
	// AgentArgs are further arguments of the agent.
	AgentArgs []string
	// User is whom the control plane runs as; it is made if it is missing.
	// Empty means the owner of the data that is there.
	User string
	// Say tells people what is done.
	Say func(format string, args ...any)
}

// Server is the URL for clients.
func (c Config) Server() string { return "https://" + c.at(c.ClientPort) }

// AdminTokenFile is where the first start of the control plane puts the
// administrator's token.
func (c Config) AdminTokenFile() string { return filepath.Join(c.controlPlaneDir(), "admin-token") }

func (c Config) at(port int) string { return net.JoinHostPort(c.Address, strconv.Itoa(port)) }

func (c Config) controlPlaneDir() string { return filepath.Join(c.DataDir, "controlplane") }
func (c Config) agentDir() string        { return filepath.Join(c.DataDir, "agent") }
func (c Config) logDir() string          { return filepath.Join(c.DataDir, "log") }

func (c Config) controlPlane() daemon {
	return daemon{
		name: "control plane", pidFile: filepath.Join(c.RunDir, "controlplane.pid"),
		logFile: filepath.Join(c.logDir(), "controlplane.log"), logMode: 0o640,
	}
}

func (c Config) agent() daemon {
	return daemon{
		name: "agent", pidFile: filepath.Join(c.RunDir, "agent.pid"),
		logFile: filepath.Join(c.logDir(), "agent.log"), logMode: 0o600,
	}
}

// Status says what runs. A pid of 0 means that it does not.
type Status struct {
	ControlPlane, Agent           int
	ControlPlaneReady, AgentReady bool
	ControlPlaneLog, AgentLog     string
}

// Status looks at the processes and asks whether they are ready.
func (c Config) Status(ctx context.Context) (Status, error) {
	s := Status{ControlPlaneLog: c.controlPlane().logFile, AgentLog: c.agent().logFile}
	for _, d := range []struct {
		daemon
		pid   *int
		ready *bool
		port  int
	}{
		{c.controlPlane(), &s.ControlPlane, &s.ControlPlaneReady, c.OpsPort},
		{c.agent(), &s.Agent, &s.AgentReady, c.HealthPort},
	} {
		p, err := d.running()
		if err != nil {
			return s, err
		}
		if p == nil {
			continue
		}
		*d.pid = p.pid
		*d.ready = askReady(ctx, d.port) == nil
		if err := p.close(); err != nil {
			return s, err
		}
	}
	return s, nil
}

// StartControlPlane starts the control plane unless it runs, and waits until
// it is ready.
func (c Config) StartControlPlane(ctx context.Context) error {
	d := c.controlPlane()
	if done, err := c.already(ctx, d, c.OpsPort, c.at(c.ClientPort), c.at(c.AgentPort)); done || err != nil {
		return err
	}
	program, err := c.find(controlPlaneProgram)
	if err != nil {
		return err
	}
	owner, err := c.owner(ctx)
	if err != nil {
		return err
	}
	if program, err = c.reachable(program, owner); err != nil {
		return err
	}
	for _, dir := range []string{c.controlPlaneDir(), filepath.Join(c.DataDir, "keys")} {
		if err := mkdirFor(dir, 0o700, owner.uid, owner.gid); err != nil {
			return err
		}
		if err := chownAll(dir, owner); err != nil {
			return err
		}
	}
	cmd := exec.Command(program, "serve", //nolint:gosec,noctx // it outlives this command
		"--data-dir", c.controlPlaneDir(),
		"--master-key-file", filepath.Join(c.DataDir, "keys", "master.key"),
		"--client-listen", c.at(c.ClientPort), "--agent-listen", c.at(c.AgentPort), "--ops-listen", loopback(c.OpsPort))
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")} //nolint:forbidigo // the search path is the operating system's
	if owner.uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(owner.uid), Gid: uint32(owner.gid)}} //nolint:gosec // ids are 32 bits
	}
	if err := d.start(ctx, cmd, func(ctx context.Context) error { return awaitReady(ctx, c.OpsPort) }); err != nil {
		return err
	}
	c.Say("The control plane runs as %s and listens on %s.", owner.name, c.Server())
	return c.rememberBinaries(program)
}

// NeedsToken reports whether the agent has yet to join.
func (c Config) NeedsToken() bool {
	// The key is there before the first Join, the certificate after it.
	text, err := os.ReadFile(filepath.Join(c.agentDir(), "identity.pem"))
	return err != nil || !strings.Contains(string(text), "BEGIN CERTIFICATE")
}

// StartAgent starts the agent unless it runs, and waits until the control
// plane has answered it. The token may be empty if it has joined.
func (c Config) StartAgent(ctx context.Context, token string) error {
	d := c.agent()
	if done, err := c.already(ctx, d, c.HealthPort); done || err != nil {
		return err
	}
	program, err := c.find(agentProgram)
	if err != nil {
		return err
	}
	if err := mkdirFor(c.agentDir(), 0o700, 0, 0); err != nil {
		return err
	}
	args := []string{
		"cloud", "--server", "https://" + c.at(c.AgentPort), "--state-dir", c.agentDir(), "--run-dir", c.RunDir,
		"--bin-dir", filepath.Dir(program), "--health-address", loopback(c.HealthPort),
		"--advertise-address", c.Address,
	}
	if c.PortRange != "" {
		args = append(args, "--port-range", c.PortRange)
	}
	for _, pool := range c.Pools {
		args = append(args, "--pool", pool)
	}
	args = append(args, c.AgentArgs...)
	if err := c.rememberAgent(args); err != nil {
		return err
	}
	return c.runAgent(ctx, d, program, args, token)
}

// ResumeAgent starts the agent as it was started before, so that it finds its
// machines again.
func (c Config) ResumeAgent(ctx context.Context) error {
	d := c.agent()
	if done, err := c.already(ctx, d, c.HealthPort); done || err != nil {
		return err
	}
	program, err := c.find(agentProgram)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(c.agentArgsFile())
	if err != nil {
		return err
	}
	var args []string
	if err := json.Unmarshal(text, &args); err != nil {
		return fmt.Errorf("%s is damaged: %w: run `docker depot up` first", c.agentArgsFile(), err)
	}
	return c.runAgent(ctx, d, program, args, "")
}

func (c Config) agentArgsFile() string { return filepath.Join(c.DataDir, "agent.json") }

func (c Config) rememberAgent(args []string) error {
	text, err := json.Marshal(args)
	if err != nil {
		return err
	}
	return os.WriteFile(c.agentArgsFile(), append(text, '\n'), 0o600)
}

func (c Config) runAgent(ctx context.Context, d daemon, program string, args []string, token string) (err error) {
	if token != "" {
		file := filepath.Join(c.RunDir, "agent.token")
		if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.Remove(file)) }()
		args = append(args, "--token-file", file)
	}
	cmd := exec.Command(program, args...)           //nolint:gosec,noctx // it outlives this command
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")} //nolint:forbidigo // the search path is the operating system's
	if err := d.start(ctx, cmd, func(ctx context.Context) error { return awaitReady(ctx, c.HealthPort) }); err != nil {
		return err
	}
	c.Say("The agent runs as root and serves the control plane.")
	return nil
}

// already reports whether a daemon runs, and waits until it is ready. If it
// does not, its loopback port and what else it listens on have to be free.
func (c Config) already(ctx context.Context, d daemon, port int, listens ...string) (bool, error) {
	for _, dir := range []string{c.RunDir, c.DataDir, c.logDir()} {
		if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // the daemons' users have to pass
			return false, err
		}
	}
	p, err := d.running()
	if err != nil {
		return false, err
	}
	if p == nil {
		return false, free(ctx, d, append(listens, loopback(port))...)
	}
	defer p.close() //nolint:errcheck // a descriptor of ours
	if err := awaitReady(ctx, port); err != nil {
		return true, fmt.Errorf("the %s runs (process %d) but is not ready: %w: see %s", d.name, p.pid, err, d.logFile)
	}
	c.Say("The %s runs already (process %d).", d.name, p.pid)
	return true, nil
}

// free refuses addresses on which something else answers already: on its
// loopback port it would even be taken for the daemon.
func free(ctx context.Context, d daemon, addresses ...string) error {
	for _, address := range addresses {
		conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", address)
		if err != nil {
			continue // nobody answers, as it should be
		}
		return errors.Join(fmt.Errorf("the %s was not started: another program listens on %s. Is it one of another --run-dir? Choose other ports, or end it",
			d.name, address), conn.Close())
	}
	return nil
}

// StopAgent ends the agent. It reports whether it ran.
func (c Config) StopAgent(ctx context.Context) (bool, error) { return c.agent().stop(ctx, stopTimeout) }

// StopControlPlane ends the control plane. It reports whether it ran.
func (c Config) StopControlPlane(ctx context.Context) (bool, error) {
	return c.controlPlane().stop(ctx, stopTimeout)
}

// Purge removes all data. It refuses while something is mounted there: then a
// machine still runs.
func (c Config) Purge() error {
	for _, dir := range []string{c.DataDir, c.RunDir} {
		mounted, err := mountsBelow(dir)
		if err != nil {
			return err
		}
		if len(mounted) > 0 {
			return fmt.Errorf("%s is still mounted, so a machine may still use it: nothing was removed. "+
				"End what uses it (see `fuser -vm %s`), then run the command again", mounted[0], mounted[0])
		}
	}
	for _, path := range []string{
		c.controlPlaneDir(), filepath.Join(c.DataDir, "keys"), c.agentDir(), c.logDir(),
		filepath.Join(c.DataDir, "bin"), c.binariesFile(), c.agentArgsFile(),
		filepath.Join(c.RunDir, "relay"), filepath.Join(c.RunDir, "local"),
	} {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	for _, dir := range []string{c.DataDir, c.RunDir} {
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
	}
	return nil
}

// Leftovers reports whether machines may have outlived both daemons: something
// is mounted in the two directories.
func (c Config) Leftovers() (bool, error) {
	data, dataErr := mountsBelow(c.DataDir)
	run, runErr := mountsBelow(c.RunDir)
	return len(data)+len(run) > 0, errors.Join(dataErr, runErr)
}

// mountsBelow lists the mount points at or below dir.
func mountsBelow(dir string) ([]string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		// proc(5): the fifth field, with white space as octal escapes.
		at := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(fields[4])
		if at == dir || strings.HasPrefix(at, dir+"/") {
			found = append(found, at)
		}
	}
	return found, nil
}

// find looks for a program.
func (c Config) find(name string) (string, error) {
	dirs := c.Search
	if c.BinDir != "" {
		dirs = []string{c.BinDir}
	} else if text, err := os.ReadFile(c.binariesFile()); err == nil {
		var dir string
		if json.Unmarshal(text, &dir) == nil {
			dirs = append(dirs, dir)
		}
	}
	for _, dir := range dirs {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return filepath.Abs(path)
		}
	}
	if c.BinDir == "" {
		if path, err := exec.LookPath(name); err == nil {
			return filepath.Abs(path)
		}
		return "", fmt.Errorf("%s was not found in %s or on PATH: say where it is with --bin-dir", name, strings.Join(dirs, ", "))
	}
	return "", fmt.Errorf("--bin-dir %s has no %s", c.BinDir, name)
}

// binariesFile remembers where the programs were found: the plugin that is
// asked the next time may be a copy in another directory.
func (c Config) binariesFile() string { return filepath.Join(c.DataDir, "programs.json") }

func (c Config) rememberBinaries(program string) error {
	if filepath.Dir(program) == filepath.Join(c.DataDir, "bin") {
		return nil
	}
	text, err := json.Marshal(filepath.Dir(program))
	if err != nil {
		return err
	}
	return os.WriteFile(c.binariesFile(), append(text, '\n'), 0o644) //nolint:gosec // no secret
}

// account is a user of this host.
type account struct {
	name     string
	uid, gid int
}

// owner returns the control plane's user, made if it is missing. Where the
// user could not reach the data directory, it is root, and people are told.
func (c Config) owner(ctx context.Context) (account, error) {
	root := account{name: "root"}
	if c.User == root.name {
		return root, nil
	}
	if c.User == "" {
		var stat unix.Stat_t
		err := unix.Stat(c.controlPlaneDir(), &stat)
		return account{name: "the owner of its data", uid: int(stat.Uid), gid: int(stat.Gid)}, err
	}
	if closed := closedParent(c.DataDir); closed != "" {
		c.Say("The control plane runs as root: the user %s could not reach %s, because %s is closed to others. Another --data-dir avoids that.", c.User, c.DataDir, closed)
		return root, nil
	}
	found, err := user.Lookup(c.User)
	if _, unknown := errors.AsType[user.UnknownUserError](err); unknown {
		out, failed := exec.CommandContext(ctx, "useradd", "--system", "--user-group", "--no-create-home", //nolint:gosec // the operator chose the name
			"--home-dir", c.DataDir, "--shell", "/usr/sbin/nologin", c.User).CombinedOutput()
		if failed != nil {
			return root, fmt.Errorf("make the user %s with useradd: %w: %s", c.User, failed, strings.TrimSpace(string(out)))
		}
		c.Say("Made the system user %s for the control plane.", c.User)
		found, err = user.Lookup(c.User)
	}
	if err != nil {
		return root, err
	}
	uid, err := strconv.Atoi(found.Uid)
	if err != nil {
		return root, err
	}
	gid, err := strconv.Atoi(found.Gid)
	return account{name: c.User, uid: uid, gid: gid}, err
}

// chownAll gives a directory's files to a user: an earlier start may have been
// another's. The directory belongs to that user, so nothing in it may lead
// elsewhere.
func chownAll(dir string, owner account) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // it was only walked
	return fs.WalkDir(root.FS(), ".", func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return root.Lchown(path, owner.uid, owner.gid)
	})
}

// closedParent returns the directory on the way to path, path included, that
// others cannot pass.
func closedParent(path string) string {
	for dir := path; ; dir = filepath.Dir(dir) {
		if info, err := os.Stat(dir); err == nil && info.Mode().Perm()&0o001 == 0 {
			return dir
		}
		if dir == filepath.Dir(dir) {
			return ""
		}
	}
}

// reachable returns a path of the program that its user can run: the program
// itself, or a copy in the data directory.
func (c Config) reachable(program string, owner account) (_ string, err error) {
	if owner.uid == 0 || closedParent(program) == "" {
		return program, nil
	}
	if err := mkdirFor(filepath.Join(c.DataDir, "bin"), 0o755, 0, 0); err != nil {
		return "", err
	}
	from, err := os.Open(program) //nolint:gosec // found by name where the operator said
	if err != nil {
		return "", err
	}
	defer from.Close() //nolint:errcheck // it was only read
	to := filepath.Join(c.DataDir, "bin", filepath.Base(program))
	tmp, err := os.OpenFile(to+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755) //nolint:gosec // a program that others run
	if err != nil {
		return "", err
	}
	_, err = io.Copy(tmp, from)
	if err := errors.Join(err, tmp.Close()); err != nil {
		return "", err
	}
	return to, os.Rename(to+".new", to)
}

func loopback(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }

// askReady asks a daemon whether it is ready.
func askReady(ctx context.Context, port int) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+loopback(port)+"/readyz", http.NoBody)
	if err != nil {
		return err
	}
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}} // never through a proxy
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close() //nolint:errcheck // only the status is wanted
	if resp.StatusCode != http.StatusOK {
		text, err := io.ReadAll(io.LimitReader(resp.Body, 512))
		return errors.Join(fmt.Errorf("%s: %s", resp.Status, strings.TrimSpace(string(text))), err)
	}
	return nil
}

// awaitReady asks until the answer is yes.
func awaitReady(parent context.Context, port int) error {
	ctx, cancel := context.WithTimeout(parent, readyTimeout)
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		err := askReady(ctx, port)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			if parent.Err() != nil {
				return context.Cause(parent)
			}
			return fmt.Errorf("no answer within %s: %w", readyTimeout, err)
		case <-tick.C:
		}
	}
}
