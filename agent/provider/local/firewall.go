package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"text/template"
)

// firewall is what the provider changes of the host's network for all machines
// together: a table of its own, rules beside those of Docker, ufw and firewalld
// that would drop forwarded packets, and forwarding on the uplinks. All of it is
// there while there are machines, and is made sure of at each launch.
type firewall struct {
	// name tells this provider's things from those of another agent's.
	name    string
	devices string // the machines' devices begin with this
	network netip.Prefix
	allow   []Allow
	deny    []netip.Prefix
	// journal is a file that lists the interfaces whose forwarding was off.
	journal string
}

// table is the whole policy. Drops come before destination NAT (-100), so that
// a port which Docker publishes on the host is dropped as the host's address,
// not looked at as the container's. They hold no state: machines are never
// called from outside but through their door, which is a socket of the host's.
//
// Beside Docker, what machines send is let through before Docker's own rules
// that keep containers apart: so a bridge that is no way to the world is closed
// to them, but for what was allowed and so was translated on its way.
const table = `
table inet {{.Name}}
delete table inet {{.Name}}
table inet {{.Name}} {
	chain from_machines {
		meta nfproto ipv6 drop
		fib saddr . iif oif missing drop comment "not the machine's own address"
{{- range .Allow}}
		ip daddr {{.Prefix}} {{if .Port}}meta l4proto { tcp, udp } th dport {{.Port}} {{end}}accept
{{- end}}
		fib daddr type { local, broadcast, multicast, anycast } drop
		ip daddr { {{.Closed}} } drop
	}
	chain prerouting {
		type filter hook prerouting priority -150; policy accept;
		iifname "{{.Devices}}*" jump from_machines
	}
	chain forwarding {
		type filter hook forward priority 0; policy accept;
		oifname "{{.Devices}}*" ct state established,related accept
		oifname "{{.Devices}}*" drop
{{- range .Allow}}
		iifname "{{$.Devices}}*" ip daddr {{.Prefix}} {{if .Port}}meta l4proto { tcp, udp } th dport {{.Port}} {{end}}accept
{{- end}}
		iifname "{{.Devices}}*" meta oifkind "bridge" ct status & dnat == 0 {{if .Ways}}oifname != { {{.Ways}} } {{end}}drop comment "containers and virtual machines of the host"
{{- if .Uplinks}}
		iifname { {{.Uplinks}} } oifname { {{.Uplinks}} } drop comment "forwarding is on for machines only"
{{- end}}
	}
	chain postrouting {
		type nat hook postrouting priority 100; policy accept;
		ip saddr {{.Network}} oifname != "{{.Devices}}*" masquerade
	}
}
`

// closedPrefixes are never reached, whoever routes them: link-local with the
// clouds' metadata services, loopback, multicast and reserved addresses.
func closedPrefixes() []netip.Prefix {
	return []netip.Prefix{
		netip.MustParsePrefix("0.0.0.0/8"),
		netip.MustParsePrefix("127.0.0.0/8"),
		netip.MustParsePrefix("169.254.0.0/16"),
		netip.MustParsePrefix("224.0.0.0/3"),
	}
}

// closed lists what machines are kept from besides the host itself. Sets of nft
// refuse overlapping intervals, so what another one covers is left out.
func (f firewall) closed() []netip.Prefix {
	all := append(closedPrefixes(), f.network)
	for _, p := range f.deny {
		if p.Addr().Is4() {
			all = append(all, p.Masked())
		}
	}
	slices.SortFunc(all, func(a, b netip.Prefix) int { return a.Bits() - b.Bits() })
	var kept []netip.Prefix
	for _, p := range all {
		if !slices.ContainsFunc(kept, p.Overlaps) {
			kept = append(kept, p)
		}
	}
	return kept
}

// ruleset is the table as nft reads it, to be put in place of the former one in
// one transaction. guarded are the uplinks that forward for machines only, and
// ways those of the default routes.
func (f firewall) ruleset(guarded []string, ways []uplink) (string, error) {
	var closed, uplinks, out []string
	for _, w := range ways {
		out = append(out, `"`+w.name+`"`)
	}
	for _, p := range f.closed() {
		closed = append(closed, p.String())
	}
	for _, u := range guarded {
		uplinks = append(uplinks, `"`+u+`"`)
	}
	var b bytes.Buffer
	err := template.Must(template.New("").Parse(table)).Execute(&b, map[string]any{
		"Name": f.name, "Devices": f.devices, "Network": f.network, "Allow": f.allow,
		"Closed": strings.Join(closed, ", "), "Uplinks": strings.Join(uplinks, ", "), "Ways": strings.Join(out, ", "),
	})
	return b.String(), err
}

// up makes sure that all of it is in place.
func (f firewall) up(ctx context.Context, links []uplink) error {
	guarded, err := f.forward(links)
	if err != nil {
		return fmt.Errorf("firewall: %w", err)
	}
	ways, err := uplinks(nil)
	if err != nil {
		return fmt.Errorf("firewall: %w", err)
	}
	rules, err := f.ruleset(guarded, ways)
	if err != nil {
		return fmt.Errorf("firewall: %w", err)
	}
	if err := run(ctx, rules, "nft", "-f", "-"); err != nil {
		return fmt.Errorf("firewall: %w", err)
	}
	if err := f.besideIptables(ctx); err != nil {
		return fmt.Errorf("firewall: %w", err)
	}
	if firewalld() {
		if err := run(ctx, "", "firewall-cmd", "--zone=trusted", "--add-source="+f.network.String()); err != nil {
			return fmt.Errorf("firewall: %w", err)
		}
	}
	return nil
}

// down removes all of it, whatever part of it is there.
func (f firewall) down(ctx context.Context) error {
	var errs []error
	errs = append(errs, run(ctx, fmt.Sprintf("table inet %s\ndelete table inet %[1]s\n", f.name), "nft", "-f", "-"))
	errs = append(errs, f.removeIptables(ctx))
	if firewalld() {
		errs = append(errs, run(ctx, "", "firewall-cmd", "--zone=trusted", "--remove-source="+f.network.String()))
	}
	errs = append(errs, f.unforward())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("firewall: %w", err)
	}
	return nil
}

// rule is one of iptables' that lets machines' packets pass; what machines may
// not reach was dropped before.
type rule struct {
	chain string
	match []string
}

func (r rule) args(verb, comment string) []string {
	args := append([]string{"-w", "5", verb, r.chain}, r.match...)
	return append(args, "-m", "comment", "--comment", comment, "-j", "ACCEPT")
}

// rules are what passes in the given chain of forwarded packets, and what is
// allowed of the host itself.
func (f firewall) rules(forward string) []rule {
	devices := f.devices + "+"
	rules := []rule{
		{forward, []string{"-i", devices}},
		{forward, []string{"-o", devices, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED"}},
	}
	for _, a := range f.allow {
		if a.Port == 0 {
			rules = append(rules, rule{"INPUT", []string{"-i", devices, "-d", a.Prefix.String()}})
			continue
		}
		for _, proto := range []string{"tcp", "udp"} {
			rules = append(rules, rule{"INPUT", []string{"-i", devices, "-d", a.Prefix.String(), "-p", proto, "--dport", fmt.Sprint(a.Port)}})
		}
	}
	return rules
}

// besideIptables adds rules where dockerd, ufw or the administrator drop
// forwarded packets: in DOCKER-USER, which Docker keeps for this, or else at the
// head of FORWARD. Nothing to do where there is no iptables.
func (f firewall) besideIptables(ctx context.Context) error {
	if !onPath("iptables") {
		return nil
	}
	chain := "FORWARD"
	if run(ctx, "", "iptables", "-w", "5", "-n", "-L", "DOCKER-USER") == nil {
		chain = "DOCKER-USER"
	}
	for _, r := range f.rules(chain) {
		if run(ctx, "", "iptables", r.args("-C", f.name)...) == nil {
			continue
		}
		if err := run(ctx, "", "iptables", r.args("-I", f.name)...); err != nil {
			return err
		}
	}
	return nil
}

// removeIptables removes every rule that carries the provider's comment,
// whichever chain it is in and whatever was allowed when it was made.
func (f firewall) removeIptables(ctx context.Context) error {
	if !onPath("iptables") {
		return nil
	}
	out, err := exec.CommandContext(ctx, "iptables", "-w", "5", "-S").Output()
	if err != nil {
		return fmt.Errorf("iptables -S: %w", err)
	}
	var errs []error
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "-A" {
			continue
		}
		for i, word := range fields {
			fields[i] = strings.Trim(word, `"`)
		}
		if i := slices.Index(fields, "--comment"); i < 0 || i+1 >= len(fields) || fields[i+1] != f.name {
			continue
		}
		fields[0] = "-D"
		errs = append(errs, run(ctx, "", "iptables", append([]string{"-w", "5"}, fields...)...))
	}
	return errors.Join(errs...)
}

func firewalld() bool {
	return onPath("firewall-cmd") && exists("/run/firewalld.pid")
}

// forward lets the kernel forward answers from the uplinks, and journals what it
// turned on, first. It returns all that is in the journal.
func (f firewall) forward(links []uplink) ([]string, error) {
	on, err := f.journaled()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		file := "/proc/sys/net/ipv4/conf/" + l.name + "/forwarding"
		b, err := os.ReadFile(file) //nolint:gosec // G304: the kernel names interfaces
		if err != nil {
			return nil, fmt.Errorf("forwarding on %s: %w", l.name, err)
		}
		if strings.TrimSpace(string(b)) == "1" {
			continue
		}
		if !slices.Contains(on, l.name) {
			on = append(on, l.name)
			j, err := json.Marshal(on)
			if err != nil {
				return nil, err
			}
			if err := writeDurably(f.journal, j); err != nil {
				return nil, err
			}
		}
		if err := sysctl("ipv4/conf/"+l.name+"/forwarding", "1"); err != nil {
			return nil, fmt.Errorf("forwarding on %s: %w", l.name, err)
		}
	}
	return on, nil
}

// unforward puts back what the journal lists, unless somebody turned forwarding
// on for the whole host since.
func (f firewall) unforward() error {
	on, err := f.journaled()
	if err != nil || len(on) == 0 {
		return err
	}
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	if err != nil {
		return err
	}
	if strings.TrimSpace(string(b)) == "0" {
		for _, name := range on {
			if err := sysctl("ipv4/conf/"+name+"/forwarding", "0"); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return os.Remove(f.journal)
}

func (f firewall) journaled() ([]string, error) {
	b, err := os.ReadFile(f.journal)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var on []string
	if err := json.Unmarshal(b, &on); err != nil {
		return nil, fmt.Errorf("read %s: %w", f.journal, err)
	}
	return on, nil
}

func onPath(name string) bool {
	_, err := exec.LookPath(name)
	return err == nil
}

// run runs a program; its error quotes what the program said.
func run(ctx context.Context, stdin, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...) //nolint:gosec // G204: programs of the host, with arguments that were checked
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}
