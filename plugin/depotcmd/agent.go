package depotcmd

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/docker/cli/cli/command/formatter"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
)

func (a *app) poolCommand() *cobra.Command {
	return group("pool", "Show pools", a.poolListCommand())
}

// poolRow is a line of `pool ls`.
type poolRow struct {
	Name, Agent, Connected, Provider, Arch, Machines, CPUs, Memory, Isolated, Closed, Warnings string
}

func (r poolRow) id() string { return r.Agent + "/" + r.Name }

// FullHeader names the columns.
func (poolRow) FullHeader() any {
	return formatter.SubHeaderContext{
		"Name": "POOL", "Agent": "AGENT", "Connected": "CONNECTED", "Provider": "PROVIDER", "Arch": "ARCH",
		"Machines": "MACHINES", "CPUs": "CPUS", "Memory": "MEMORY", "Isolated": "ISOLATED", "Closed": "CLOSED", "Warnings": "WARNINGS",
	}
}

func poolRowOf(p *depotv1.PoolInfo) poolRow {
	pool := p.GetPool()
	return poolRow{
		Name: pool.GetName(), Agent: p.GetAgent(), Connected: yesNo(p.GetConnected()), Provider: pool.GetProvider(),
		Arch:     archName(pool.GetArch(), pool.GetEmulated()),
		Machines: fmt.Sprintf("%d/%d", p.GetMachines(), pool.GetMaxMachines()),
		CPUs:     strconv.Itoa(int(pool.GetCpus())), Memory: memory(pool.GetMemoryBytes()),
		Isolated: yesNo(pool.GetIsolated()), Closed: pool.GetClosed(), Warnings: strings.Join(pool.GetWarnings(), "; "),
	}
}

func (a *app) poolListCommand() *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use:     "ls [OPTIONS]",
		Aliases: []string{"list"},
		Short:   "List the pools of all agents",
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(func(c *client.Client) error {
				resp, err := c.Admin.ListPools(cmd.Context(), &depotv1.ListPoolsRequest{})
				if err != nil {
					return err
				}
				rows := make([]poolRow, 0, len(resp.GetPools()))
				for _, p := range resp.GetPools() {
					rows = append(rows, poolRowOf(p))
				}
				if err := list(a.cli.Out(), o, `{{.Name}}\t{{.Agent}}\t{{.Connected}}\t{{.Provider}}\t{{.Arch}}\t{{.Machines}}\t{{.CPUs}}\t{{.Memory}}\t{{.Closed}}`, rows); err != nil {
					return err
				}
				for _, r := range rows {
					if r.Warnings != "" && o.format == formatter.TableFormatKey && !o.quiet {
						a.notef("Pool %s: %s", r.id(), r.Warnings)
					}
				}
				return nil
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	o.install(cmd)
	return cmd
}

func (a *app) agentCommand() *cobra.Command {
	return group("agent", "Manage cloud agents", a.agentListCommand(), a.agentTokenCommand(), a.agentRemoveCommand())
}

// agentRow is a line of `agent ls`.
type agentRow struct {
	ID, Name, Connected, LastSeen, Version, Pools, Orphans string
}

func (r agentRow) id() string { return r.ID }

// FullHeader names the columns.
func (agentRow) FullHeader() any {
	return formatter.SubHeaderContext{
		"ID": "AGENT ID", "Name": "NAME", "Connected": "CONNECTED", "LastSeen": "LAST SEEN", "Version": "VERSION",
		"Pools": "POOLS", "Orphans": "ORPHANS",
	}
}

func agentRowOf(g *depotv1.Agent, now time.Time) agentRow {
	return agentRow{
		ID: g.GetId(), Name: g.GetName(), Connected: yesNo(g.GetConnected()), LastSeen: ago(g.GetLastSeen(), now),
		Version: g.GetVersion(), Pools: strings.Join(g.GetPools(), ","), Orphans: strings.Join(g.GetOrphans(), ","),
	}
}

func (a *app) agentListCommand() *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use:     "ls [OPTIONS]",
		Aliases: []string{"list"},
		Short:   "List cloud agents",
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(func(c *client.Client) error {
				resp, err := c.Admin.ListAgents(cmd.Context(), &depotv1.ListAgentsRequest{})
				if err != nil {
					return err
				}
				rows := make([]agentRow, 0, len(resp.GetAgents()))
				for _, g := range resp.GetAgents() {
					rows = append(rows, agentRowOf(g, time.Now()))
				}
				return list(a.cli.Out(), o, `{{.ID}}\t{{.Name}}\t{{.Connected}}\t{{.LastSeen}}\t{{.Version}}\t{{.Pools}}\t{{.Orphans}}`, rows)
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	o.install(cmd)
	return cmd
}

func (a *app) agentTokenCommand() *cobra.Command {
	var lifetime time.Duration
	cmd := &cobra.Command{
		Use:   "token [OPTIONS] NAME",
		Short: "Create a token with which one agent joins, once",
		Args:  exactArgs("a name for the agent"),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := &depotv1.CreateTokenRequest{Kind: kindAgent, Name: args[0]}
			switch {
			case lifetime < 0:
				return usageError(cmd, fmt.Errorf("--expires %s is in the past: give a positive duration, like 1h", lifetime))
			case lifetime > 0:
				req.Lifetime = durationpb.New(lifetime)
			}
			return a.printToken(cmd.Context(), req, "It is shown this once and joins one agent: put it into the file that depot-agent's --token-file names.")
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().DurationVar(&lifetime, "expires", 0, "How long it can be used for joining (default 1h)")
	return cmd
}

func (a *app) agentRemoveCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:     "rm [OPTIONS] ID [ID...]",
		Aliases: []string{"remove"},
		Short:   "Forget agents that are gone for good; their volumes are lost",
		Args:    atLeastOne("agent id"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return a.withClient(func(c *client.Client) error {
				return a.each(args, func(id string) error {
					if !force {
						if err := a.confirm(ctx, fmt.Sprintf("This forgets agent %s: it can never come back.", id)); err != nil {
							return err
						}
					}
					_, err := c.Admin.DeleteAgent(ctx, &depotv1.DeleteAgentRequest{Id: id, Force: force})
					return err
				})
			})
		},
		ValidArgsFunction: a.completeAgents,
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Do not ask, and forget it though it holds volumes")
	return cmd
}

func (a *app) completeAgents(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, args, func(ctx context.Context, c *client.Client) ([]string, error) {
		resp, err := c.Admin.ListAgents(ctx, &depotv1.ListAgentsRequest{})
		ids := make([]string, 0, len(resp.GetAgents()))
		for _, g := range resp.GetAgents() {
			ids = append(ids, g.GetId())
		}
		return ids, err
	})
}
