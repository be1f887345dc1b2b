package local

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// machineBits is the size of a machine's own network.
const machineBits = 24

// subnet is the addresses of one machine: .1 is the host's end of its link, .2
// its own, and the upper half is for its RUN steps.
type subnet struct{ prefix netip.Prefix }

// slots is how many machines a network has room for.
func slots(network netip.Prefix) int { return 1 << (machineBits - network.Bits()) }

func subnetOf(network netip.Prefix, slot int) subnet {
	b := network.Addr().As4()
	n := (uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8) + uint32(slot)<<8                                        //nolint:gosec // G115: slots fit by construction
	return subnet{netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), 0}), machineBits)} //nolint:gosec // G115: the bytes of a number
}

func (s subnet) at(n byte) netip.Addr {
	b := s.prefix.Addr().As4()
	b[3] = n
	return netip.AddrFrom4(b)
}

func (s subnet) host() netip.Addr    { return s.at(1) }
func (s subnet) machine() netip.Addr { return s.at(2) }
func (s subnet) steps() netip.Prefix { return netip.PrefixFrom(s.at(128), machineBits+1) }

// cniConfig is the network of RUN steps: a bridge inside the machine. Nothing
// is masked there; the host routes the addresses and masks them once.
func (s subnet) cniConfig(mtu int) ([]byte, error) {
	return json.Marshal(map[string]any{
		"cniVersion": "1.0.0",
		"name":       "depot",
		"plugins": []any{map[string]any{
			"type":      "bridge",
			"bridge":    "depot0",
			"isGateway": true,
			"mtu":       mtu,
			"ipam": map[string]any{
				"type":    "host-local",
				"dataDir": "/run/cni",
				"ranges":  []any{[]any{map[string]any{"subnet": s.steps().String()}}},
				"routes":  []any{map[string]any{"dst": "0.0.0.0/0"}},
			},
		}},
	})
}

// linkUp connects a process's network namespace to this one: a veth pair named
// name here and eth0 there.
func linkUp(name string, pid, mtu int, s subnet) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("connect machine to %s: %w", name, err)
		}
	}()
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ns.Close()) }()
	inside, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer inside.Close()

	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, mtu
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(ns))}
	if err := netlink.LinkAdd(veth); err != nil {
		return err
	}
	if err := hostEnd(name, s); err != nil {
		return err
	}
	return machineEnd(inside, s)
}

func hostEnd(name string, s subnet) error {
	// The host has no use for IPv6 on this link, and one address less to guard.
	if err := sysctl("ipv6/conf/"+name+"/disable_ipv6", "1"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := sysctl("ipv4/conf/"+name+"/forwarding", "1"); err != nil {
		return err
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(s.host(), 32)), Peer: ipNet(netip.PrefixFrom(s.machine(), 32))}
	if err := netlink.AddrAdd(link, addr); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	return netlink.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(s.prefix), Gw: s.machine().AsSlice()})
}

func machineEnd(h *netlink.Handle, s subnet) error {
	for _, name := range []string{"lo", "eth0"} {
		link, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		if name == "lo" {
			if err := h.LinkSetUp(link); err != nil {
				return err
			}
			continue
		}
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(s.machine(), 32)), Peer: ipNet(netip.PrefixFrom(s.host(), 32))}
		if err := h.AddrAdd(link, addr); err != nil {
			return err
		}
		if err := h.LinkSetUp(link); err != nil {
			return err
		}
		if err := h.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: s.host().AsSlice()}); err != nil {
			return err
		}
	}
	return nil
}

// linkDown removes the pair; no error if there is none.
func linkDown(name string) error {
	link, err := netlink.LinkByName(name)
	if notFound := (netlink.LinkNotFoundError{}); errors.As(err, &notFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for %s: %w", name, err)
	}
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

// uplink is an interface by which machines reach the world.
type uplink struct {
	name string
	mtu  int
}

// uplinks finds the interfaces of the default routes and of the routes to the
// given addresses.
func uplinks(to []netip.Addr) ([]uplink, error) {
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	indexes := map[int]bool{}
	for _, r := range routes {
		if r.Dst != nil && r.Dst.IP != nil && !r.Dst.IP.IsUnspecified() {
			continue
		}
		indexes[r.LinkIndex] = true
		for _, hop := range r.MultiPath {
			indexes[hop.LinkIndex] = true
		}
	}
	for _, addr := range to {
		found, err := netlink.RouteGet(net.IP(addr.AsSlice()))
		if err != nil {
			continue // no route: nothing to forward
		}
		for _, r := range found {
			indexes[r.LinkIndex] = true
		}
	}
	var links []uplink
	for index := range indexes {
		link, err := netlink.LinkByIndex(index)
		if err != nil {
			continue // a route without a device, or one that just went away
		}
		if link.Attrs().Flags&net.FlagLoopback == 0 {
			links = append(links, uplink{link.Attrs().Name, link.Attrs().MTU})
		}
	}
	return links, nil
}

// mtuOf is what fits through every uplink.
func mtuOf(links []uplink) int {
	const ethernet = 1500
	mtu := ethernet
	for _, l := range links {
		mtu = min(mtu, l.mtu)
	}
	return mtu
}

// localAddrs are all addresses of this host.
func localAddrs() ([]netip.Addr, error) {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var addrs []netip.Addr
	for _, a := range list {
		if addr, ok := netip.AddrFromSlice(a.IP); ok {
			addrs = append(addrs, addr.Unmap())
		}
	}
	return addrs, nil
}

// checkNetwork refuses a network that a route of the host overlaps with, unless
// the route is of the provider's own devices.
func checkNetwork(network netip.Prefix, own string) error {
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil || r.Dst.IP.IsUnspecified() {
			continue
		}
		bits, _ := r.Dst.Mask.Size()
		addr, _ := netip.AddrFromSlice(r.Dst.IP)
		dst := netip.PrefixFrom(addr.Unmap(), bits)
		if !dst.Overlaps(network) {
			continue
		}
		name := "no device"
		if link, err := netlink.LinkByIndex(r.LinkIndex); err == nil {
			name = link.Attrs().Name
		}
		if len(name) > len(own) && name[:len(own)] == own {
			continue
		}
		return fmt.Errorf("network %s for machines overlaps with the host's route to %s by %s: configure another network", network, dst, name)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// sysctl sets a value below net of this thread's network namespace.
func sysctl(name, value string) error {
	return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0o644) //nolint:gosec // G306: the file exists
}
