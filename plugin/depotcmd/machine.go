package depotcmd

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/go-units"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/spf13/cobra"
)

func (a *app) machineCommand() *cobra.Command {
	return group("machine", "Manage machines", a.machineListCommand(), a.machineInspectCommand(), a.machineStopCommand())
}

// machineRow is a line of `machine ls`.
type machineRow struct {
	ID, Project, Arch, State, Reason, Agent, Pool, Address, Leases, Connections, CPUs, Memory, Created string
}

func (r machineRow) id() string { return r.ID }

// FullHeader names the columns.
func (machineRow) FullHeader() any {
	return formatter.SubHeaderContext{
		"ID": "MACHINE ID", "Project": "PROJECT", "Arch": "ARCH", "State": "STATE", "Reason": "REASON", "Agent": "AGENT",
		"Pool": "POOL", "Address": "ADDRESS", "Leases": "LEASES", "Connections": "CONNECTIONS", "CPUs": "CPUS",
		"Memory": "MEMORY", "Created": "CREATED",
	}
}

func machineRowOf(m *depotv1.Machine, now time.Time) machineRow {
	return machineRow{
		ID: m.GetId(), Project: m.GetProject(), Arch: archName(m.GetArch(), m.GetEmulated()), State: stateName(m.GetState()),
		Reason: m.GetReason(), Agent: m.GetAgent(), Pool: m.GetPool(), Address: m.GetAddress(),
		Leases: strconv.Itoa(int(m.GetLeases())), Connections: strconv.Itoa(int(m.GetConnections())),
		CPUs: strconv.Itoa(int(m.GetCpus())), Memory: memory(m.GetMemoryBytes()), Created: ago(m.GetCreated(), now),
	}
}

// archName marks an emulated architecture, so that nobody takes it for native.
func archName(arch string, emulated bool) string {
	if emulated {
		return arch + " (emulated)"
	}
	return arch
}

func stateName(s interface{ String() string }) string {
	name := s.String()
	for _, prefix := range []string{"MACHINE_STATE_", "LEASE_STATE_"} {
		name = strings.TrimPrefix(name, prefix)
	}
	return strings.ToLower(name)
}

func memory(bytes int64) string {
	if bytes == 0 {
		return "no limit"
	}
	return units.BytesSize(float64(bytes))
}

func (a *app) machineListCommand() *cobra.Command {
	var o listOptions
	var project string
	var all bool
	cmd := &cobra.Command{
		Use:     "ls [OPTIONS]",
		Aliases: []string{"list"},
		Short:   "List machines",
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(func(c *client.Client) error {
				machines, err := listMachines(cmd.Context(), c, project, all)
				if err != nil {
					return err
				}
				rows := make([]machineRow, 0, len(machines))
				for _, m := range machines {
					rows = append(rows, machineRowOf(m, time.Now()))
				}
				return list(a.cli.Out(), o, `{{.ID}}\t{{.Project}}\t{{.Arch}}\t{{.State}}\t{{.Leases}}\t{{.Agent}}\t{{.Pool}}\t{{.Created}}\t{{.Reason}}`, rows)
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	o.install(cmd)
	cmd.Flags().StringVar(&project, "project", "", "Only those of this project")
	cmd.Flags().BoolVarP(&all, "all", "a", false, "Also those that have ended")
	a.completeProjectFlag(cmd)
	return cmd
}

// listMachines reads all pages.
func listMachines(ctx context.Context, c *client.Client, project string, all bool) ([]*depotv1.Machine, error) {
	req := &depotv1.ListMachinesRequest{All: all, Page: &depotv1.Page{}}
	if project != "" {
		ref, err := parseProject(project)
		if err != nil {
			return nil, err
		}
		req.Project = ref
	}
	var machines []*depotv1.Machine
	for {
		resp, err := c.Admin.ListMachines(ctx, req)
		if err != nil {
			return nil, err
		}
		machines = append(machines, resp.GetMachines()...)
		if resp.GetNextPageToken() == "" {
			return machines, nil
		}
		req.Page.Token = resp.GetNextPageToken()
	}
}

// machineView is what `machine inspect` shows.
type machineView struct {
	ID              string
	Project         string
	Arch            string
	Emulated        bool
	State           string
	Reason          string `json:",omitempty"`
	Agent           string
	Pool            string
	Address         string
	Volume          string
	CPUs            int32
	MemoryBytes     int64
	BuildKitVersion string
	Connections     int32
	Usage           *depotv1.Usage `json:",omitempty"`
	Warnings        []string       `json:",omitempty"`
	Created         *time.Time     `json:",omitempty"`
	Ready           *time.Time     `json:",omitempty"`
	Gone            *time.Time     `json:",omitempty"`
	Leases          []leaseView
}

// leaseView is a lease of an inspected machine.
type leaseView struct {
	ID          string
	State       string
	Principal   string
	Connections int32
	Created     *time.Time `json:",omitempty"`
}

func machineViewOf(resp *depotv1.GetMachineResponse) machineView {
	m := resp.GetMachine()
	v := machineView{
		ID: m.GetId(), Project: m.GetProject(), Arch: m.GetArch(), Emulated: m.GetEmulated(), State: stateName(m.GetState()),
		Reason: m.GetReason(), Agent: m.GetAgent(), Pool: m.GetPool(), Address: m.GetAddress(), Volume: m.GetVolumeId(),
		CPUs: m.GetCpus(), MemoryBytes: m.GetMemoryBytes(), BuildKitVersion: m.GetBuildkitVersion(),
		Connections: m.GetConnections(), Usage: m.GetUsage(), Warnings: m.GetWarnings(),
		Created: timeOf(m.GetCreated()), Ready: timeOf(m.GetReady()), Gone: timeOf(m.GetGone()),
		Leases: []leaseView{},
	}
	for _, l := range resp.GetLeases() {
		v.Leases = append(v.Leases, leaseView{
			ID: l.GetId(), State: stateName(l.GetState()), Principal: l.GetPrincipal(),
			Connections: l.GetConnections(), Created: timeOf(l.GetCreated()),
		})
	}
	return v
}

func (a *app) machineInspectCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "inspect [OPTIONS] ID [ID...]",
		Short: "Show machines with their leases",
		Args:  atLeastOne("machine id"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(func(c *client.Client) error {
				return inspectAll(a.cli.Out(), args, format, func(id string) (any, error) {
					resp, err := c.Admin.GetMachine(cmd.Context(), &depotv1.GetMachineRequest{Id: id})
					if err != nil {
						return nil, err
					}
					return machineViewOf(resp), nil
				})
			})
		},
		ValidArgsFunction: a.completeMachines,
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", `Format output: "json" or a Go template`)
	completeWith(cmd, "format", "json")
	return cmd
}

func (a *app) machineStopCommand() *cobra.Command {
	var now, force bool
	cmd := &cobra.Command{
		Use:   "stop [OPTIONS] ID [ID...]",
		Short: "Drain machines: they end when their builds have ended",
		Args:  atLeastOne("machine id"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			return a.withClient(func(c *client.Client) error {
				return a.each(args, func(id string) error {
					if now && !force {
						if err := a.confirm(ctx, fmt.Sprintf("This ends the builds on machine %s at once.", id)); err != nil {
							return err
						}
					}
					_, err := c.Admin.StopMachine(ctx, &depotv1.StopMachineRequest{Id: id, Now: now})
					return err
				})
			})
		},
		ValidArgsFunction: a.completeMachines,
	}
	cmd.Flags().BoolVar(&now, "now", false, "End the builds instead of waiting for them")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "Do not ask")
	return cmd
}

func (a *app) completeMachines(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.complete(cmd, args, func(ctx context.Context, c *client.Client) ([]string, error) {
		machines, err := listMachines(ctx, c, "", false)
		ids := make([]string, 0, len(machines))
		for _, m := range machines {
			ids = append(ids, m.GetId())
		}
		return ids, err
	})
}
