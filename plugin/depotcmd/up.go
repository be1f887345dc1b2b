package depotcmd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/driver/credentials"
	"github.com/opendepot/depot/plugin/host"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// The project that a fresh control plane gets.
const (
	defaultOrganization = "default"
	defaultProject      = "main"
)

// Times that `up` and `down` wait, and how often they look.
const (
	poolsTimeout = 30 * time.Second
	lookEvery    = 100 * time.Millisecond
)

// hostFlags are the flags of `up` and `down`.
type hostFlags struct {
	host.Config
	emulate []string
	status  bool
}

func (f *hostFlags) install(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.DataDir, "data-dir", "/var/lib/depot", "Where data is kept")
	flags.StringVar(&f.RunDir, "run-dir", "/run/depot", "Where run-time state is kept")
	flags.StringVar(&f.BinDir, "bin-dir", "", "Where depot-controlplane and depot-agent are (default: beside this program, or on PATH)")
	flags.StringVar(&f.Address, "address", "127.0.0.1", "Address that the control plane and machines listen on")
	flags.IntVar(&f.ClientPort, "port", 8443, "Port for clients")
	flags.IntVar(&f.AgentPort, "agent-port", 8444, "Port for agents and machines")
	flags.IntVar(&f.OpsPort, "ops-port", 8445, "Loopback port of the control plane's health and metrics")
	flags.IntVar(&f.HealthPort, "health-port", 9465, "Loopback port of the agent's health and metrics")
	completeDirs(cmd, "data-dir", "run-dir", "bin-dir")
}

func completeDirs(cmd *cobra.Command, flags ...string) {
	for _, flag := range flags {
		if err := cmd.MarkFlagDirname(flag); err != nil {
			panic(err) // the flag does not exist: a fault of this package
		}
	}
}

// config checks the flags and completes the configuration.
func (a *app) hostConfig(f *hostFlags) (host.Config, error) {
	c := f.Config
	var err error
	if c.DataDir, err = filepath.Abs(c.DataDir); err != nil {
		return c, err
	}
	if c.RunDir, err = filepath.Abs(c.RunDir); err != nil {
		return c, err
	}
	executable, err := a.executable()
	if err != nil {
		return c, err
	}
	c.Search = []string{filepath.Dir(executable)}
	c.Pools = []string{"arch=" + runtime.GOARCH}
	for _, arch := range f.emulate {
		if arch == runtime.GOARCH {
			return c, fmt.Errorf("--emulate %s: this host is %s itself", arch, arch)
		}
		c.Pools = append(c.Pools, "arch="+arch+",emulated")
	}
	c.Say = a.notef
	return c, nil
}

// needRoot refuses another user, with the one command that helps.
func (a *app) needRoot(cmd *cobra.Command, uid int) error {
	if uid == 0 {
		return nil
	}
	executable, err := a.executable()
	if err != nil {
		return err
	}
	words := []string{"sudo", executable, cmd.Name()}
	cmd.Flags().Visit(func(f *pflag.Flag) { words = append(words, "--"+f.Name+"="+f.Value.String()) })
	return fmt.Errorf("this needs root, because machines are containers of this host: run `%s`", strings.Join(words, " "))
}

func (a *app) upCommand() *cobra.Command {
	f := &hostFlags{}
	cmd := &cobra.Command{
		Use:   "up [OPTIONS]",
		Short: "Run a control plane and an agent on this host, in the background",
		Long: "Run a control plane and an agent on this host, in the background, and log in to it. What runs already is left as it is.\n" +
			"Needs root: the control plane runs under a user of its own, only the agent as root.",
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.status {
				return a.hostStatus(cmd.Context(), f)
			}
			if err := a.needRoot(cmd, os.Geteuid()); err != nil {
				return err
			}
			return a.up(cmd.Context(), f)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f.install(cmd)
	flags := cmd.Flags()
	flags.StringVar(&f.User, "user", host.DefaultUser, "User of the control plane; made if it is missing")
	flags.StringVar(&f.PortRange, "machine-ports", "", "First and last port that machines listen on, like 24000-24255")
	flags.StringSliceVar(&f.emulate, "emulate", nil, "Also build for this architecture, emulated: arm64 or amd64")
	flags.StringArrayVar(&f.AgentArgs, "agent-arg", nil, "A further argument of depot-agent cloud, like --pool-size=200GiB; may be repeated")
	flags.BoolVar(&f.status, "status", false, "Only show what runs")
	completeWith(cmd, "emulate", "arm64", "amd64")
	return cmd
}

func (a *app) up(ctx context.Context, f *hostFlags) error {
	c, err := a.hostConfig(f)
	if err != nil {
		return err
	}
	if err := c.StartControlPlane(ctx); err != nil {
		return err
	}
	login, err := a.hostLogin(c)
	if err != nil {
		return err
	}
	_, login, err = a.checkAndSave(ctx, login)
	if err != nil {
		return err
	}
	config := client.Config{URL: login.URL, Token: login.Token, UserAgent: a.userAgent()}
	err = withConfig(config, func(cl *client.Client) error {
		if err := a.startAgent(ctx, cl, c); err != nil {
			return err
		}
		name, err := ensureProject(ctx, cl)
		if err != nil {
			return err
		}
		a.println("depot is up: " + login.URL)
		a.notef("The login is kept in %s. Next:\n\n  docker depot configure --project %s\n", a.keptIn(login), name)
		a.notef("Another user of this host logs in with:\n\n  sudo cat %s | docker depot login --token-stdin %s\n", c.AdminTokenFile(), login.URL)
		return nil
	})
	return err
}

// hostLogin is the administrator's login to this host's control plane.
func (a *app) hostLogin(c host.Config) (credentials.Login, error) {
	login := credentials.Login{URL: c.Server()}
	text, err := os.ReadFile(c.AdminTokenFile())
	if errors.Is(err, fs.ErrNotExist) {
		stored, err := a.deps.Source.Store.Load(login.URL)
		if errors.Is(err, credentials.ErrNotFound) {
			return login, fmt.Errorf("the control plane runs, but %s is gone and no login to %s is stored: log in with an administrator's token", c.AdminTokenFile(), login.URL)
		}
		return stored, err
	}
	if err != nil {
		return login, err
	}
	login.Token, err = client.ParseToken(string(text))
	return login, err
}

// startAgent starts the agent and waits until its pools are listed. An agent
// that runs without a pool that is wanted now is started anew: its machines go
// on meanwhile.
func (a *app) startAgent(ctx context.Context, c *client.Client, config host.Config) error {
	before, err := config.Status(ctx)
	if err != nil {
		return err
	}
	if before.Agent != 0 {
		missing, err := missingPools(ctx, c, config.Pools)
		if err != nil {
			return err
		}
		if len(missing) > 0 && before.AgentReady {
			a.notef("The agent is started anew, to serve %s.", strings.Join(missing, ", "))
			if _, err := config.StopAgent(ctx); err != nil {
				return err
			}
		}
	}
	token := ""
	if config.NeedsToken() {
		name, err := os.Hostname()
		if err != nil {
			return err
		}
		resp, err := c.Admin.CreateToken(ctx, &depotv1.CreateTokenRequest{Kind: kindAgent, Name: name})
		if err != nil {
			return fmt.Errorf("make a token for the agent: %w", err)
		}
		token = resp.GetSecret()
	}
	if err := config.StartAgent(ctx, token); err != nil {
		return err
	}
	return awaitPools(ctx, c, config.Pools)
}

// missingPools lists the architectures of wanted pools that no connected agent
// serves.
func missingPools(ctx context.Context, c *client.Client, wanted []string) ([]string, error) {
	resp, err := c.Admin.ListPools(ctx, &depotv1.ListPoolsRequest{})
	if err != nil {
		return nil, err
	}
	var missing []string
	for _, pool := range wanted {
		arch, emulated := strings.CutSuffix(strings.TrimPrefix(pool, "arch="), ",emulated")
		served := slices.ContainsFunc(resp.GetPools(), func(p *depotv1.PoolInfo) bool {
			return p.GetConnected() && p.GetPool().GetArch() == arch && p.GetPool().GetEmulated() == emulated
		})
		if !served {
			missing = append(missing, archName(arch, emulated))
		}
	}
	return missing, nil
}

func awaitPools(ctx context.Context, c *client.Client, wanted []string) error {
	ctx, cancel := context.WithTimeout(ctx, poolsTimeout)
	defer cancel()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		missing, err := missingPools(ctx, c, wanted)
		if err == nil && len(missing) == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("the agent runs, but within %s it offered no pool for %s: see its log", poolsTimeout, strings.Join(missing, ", ")), err)
		case <-tick.C:
		}
	}
}

// ensureProject returns the full name of a project, made if there is none.
func ensureProject(ctx context.Context, c *client.Client) (string, error) {
	resp, err := c.Admin.ListProjects(ctx, &depotv1.ListProjectsRequest{})
	if err != nil {
		return "", err
	}
	if len(resp.GetProjects()) > 0 {
		return fullName(resp.GetProjects()[0]), nil
	}
	made, err := c.Admin.CreateProject(ctx, &depotv1.CreateProjectRequest{
		RequestId: uuid.NewString(), Organization: defaultOrganization, Name: defaultProject,
	})
	if err != nil {
		return "", fmt.Errorf("make the first project: %w", err)
	}
	return fullName(made.GetProject()), nil
}

func (a *app) hostStatus(ctx context.Context, f *hostFlags) error {
	c, err := a.hostConfig(f)
	if err != nil {
		return err
	}
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	a.println("Control plane: " + stateOfDaemon(s.ControlPlane, s.ControlPlaneReady) + ", log " + s.ControlPlaneLog)
	a.println("Agent:         " + stateOfDaemon(s.Agent, s.AgentReady) + ", log " + s.AgentLog)
	if s.ControlPlane == 0 || s.Agent == 0 || !s.ControlPlaneReady || !s.AgentReady {
		return errors.New("depot is not up: run `docker depot up`")
	}
	return nil
}

func stateOfDaemon(pid int, ready bool) string {
	switch {
	case pid == 0:
		return "not running"
	case ready:
		return fmt.Sprintf("ready (process %d)", pid)
	default:
		return fmt.Sprintf("not ready (process %d)", pid)
	}
}

func (a *app) downCommand() *cobra.Command {
	f := &hostFlags{}
	var purge, force bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "down [OPTIONS]",
		Short: "Stop what `up` started: machines, agent and control plane",
		Long: "Stop what `up` started: machines end when their builds have ended, at the latest after --timeout; then the agent, then\n" +
			"the control plane. Caches and settings stay for the next `up`, unless --purge removes them.",
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.needRoot(cmd, os.Geteuid()); err != nil {
				return err
			}
			c, err := a.hostConfig(f)
			if err != nil {
				return err
			}
			if purge && !force {
				if err := a.confirm(cmd.Context(), fmt.Sprintf("This removes all caches, projects and tokens in %s.", c.DataDir)); err != nil {
					return err
				}
			}
			return a.down(cmd.Context(), c, purge, timeout)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f.install(cmd)
	flags := cmd.Flags()
	flags.BoolVar(&purge, "purge", false, "Also remove all data: caches, projects, tokens")
	flags.BoolVarP(&force, "force", "f", false, "Do not ask before --purge")
	flags.DurationVar(&timeout, "timeout", 30*time.Second, "How long builds may go on before they are ended")
	return cmd
}

func (a *app) down(ctx context.Context, c host.Config, purge bool, timeout time.Duration) error {
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	if err := a.endMachines(ctx, c, s, timeout); err != nil {
		if !purge {
			return err
		}
		a.notef("Warning: %v", err)
	}
	agent, err := c.StopAgent(ctx)
	if err != nil {
		return err
	}
	server, err := c.StopControlPlane(ctx)
	if err != nil {
		return err
	}
	switch {
	case purge:
		if err := c.Purge(); err != nil {
			return err
		}
		err := a.deps.Source.Store.Delete(c.Server())
		if err != nil && !errors.Is(err, credentials.ErrNotFound) {
			return err
		}
		a.println("depot is down, and its data is removed.")
	case agent || server:
		a.println("depot is down; caches and settings are kept in " + c.DataDir + ".")
	default:
		a.println("depot is not up: nothing to stop.")
	}
	return nil
}

// endMachines drains all machines of this host's control plane and waits until
// they are gone. Only the control plane may order that, and only the agent can
// do it: one that has died is started again first.
func (a *app) endMachines(ctx context.Context, c host.Config, s host.Status, timeout time.Duration) error {
	leftovers, err := c.Leftovers()
	if err != nil || s.ControlPlane == 0 && s.Agent == 0 && !leftovers {
		return err
	}
	if s.ControlPlane == 0 {
		if err := c.StartControlPlane(ctx); err != nil {
			return err
		}
	}
	login, err := a.hostLogin(c)
	if err != nil {
		return err
	}
	config := client.Config{URL: login.URL, Token: login.Token, UserAgent: a.userAgent()}
	return withConfig(config, func(cl *client.Client) error {
		machines, err := listMachines(ctx, cl, "", false)
		if err != nil || len(machines) == 0 && !leftovers {
			return err
		}
		if s.Agent == 0 { // also takes down what it finds mounted
			if err := c.ResumeAgent(ctx); err != nil {
				return err
			}
		}
		if a.drain(ctx, cl, false, timeout) == nil {
			return nil
		}
		a.notef("Builds still run after %s: they are ended.", timeout)
		return a.drain(ctx, cl, true, timeout)
	})
}

// drain orders all machines to stop until none is listed.
func (a *app) drain(parent context.Context, c *client.Client, now bool, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(parent, timeout)
	defer cancel()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	ordered := map[string]bool{}
	for {
		machines, err := listMachines(ctx, c, "", false)
		if err == nil && len(machines) == 0 {
			return nil
		}
		for _, m := range machines {
			if ordered[m.GetId()] {
				continue
			}
			if _, err := c.Admin.StopMachine(ctx, &depotv1.StopMachineRequest{Id: m.GetId(), Now: now}); err == nil {
				ordered[m.GetId()] = true
			}
		}
		select {
		case <-ctx.Done():
			ids := make([]string, 0, len(machines))
			for _, m := range machines {
				ids = append(ids, m.GetId())
			}
			return errors.Join(fmt.Errorf("machines do not end: %s: see `docker depot machine inspect`", strings.Join(ids, ", ")), err)
		case <-tick.C:
		}
	}
}
