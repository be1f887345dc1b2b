package local

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// nameservers picks the servers that a machine can reach. Behind systemd's stub
// the upstream servers are in a file of resolved's own, which comes first.
func nameservers(configured []netip.Addr, local []netip.Addr, allow []Allow) ([]netip.Addr, error) {
	if len(configured) > 0 {
		return configured, nil
	}
	var dropped []string
	for _, path := range []string{"/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"} {
		b, err := os.ReadFile(path) //nolint:gosec // G304: one of the two above
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("nameservers: %w", err)
		}
		servers, unreachable := reachable(b, local, allow)
		if len(servers) > 0 {
			return servers, nil
		}
		dropped = append(dropped, unreachable...)
	}
	return nil, fmt.Errorf("no nameserver that machines can reach (%s): name some in the agent's configuration, or allow one of these by address:53",
		strings.Join(slices.Compact(dropped), ", "))
}

// reachable splits the servers of a resolv.conf into those that a machine can
// ask and the others, each with the reason.
func reachable(conf []byte, local []netip.Addr, allow []Allow) (servers []netip.Addr, unreachable []string) {
	lines := bufio.NewScanner(bytes.NewReader(conf))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		addr, err := netip.ParseAddr(fields[1])
		switch {
		case err != nil || !addr.Is4():
			unreachable = append(unreachable, fields[1]+" is not IPv4")
		case addr.IsLoopback():
			unreachable = append(unreachable, fields[1]+" is the host's loopback")
		case slices.ContainsFunc(allow, func(a Allow) bool { return a.Prefix.Contains(addr) && (a.Port == 0 || a.Port == 53) }):
			servers = append(servers, addr)
		case addr.IsLinkLocalUnicast():
			unreachable = append(unreachable, fields[1]+" is link-local")
		case slices.Contains(local, addr):
			unreachable = append(unreachable, fields[1]+" is this host")
		default:
			servers = append(servers, addr)
		}
	}
	return servers, unreachable
}

func resolvConfFor(servers []netip.Addr) []byte {
	var b bytes.Buffer
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	return b.Bytes()
}
