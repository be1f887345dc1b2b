// Package local launches machines on this host: each one is an OCI bundle that
// runc runs, with process, mount, host name, IPC, cgroup and network namespaces
// of its own.
//
// # What a machine is made of
//
//   - Its root filesystem is assembled once from our programs and from the
//     host's git, ssh and certificates (rootfs.go), is named by the hash of its
//     content, and is shared read-only by all machines.
//   - Its network is one end of a veth pair in a /24 of its own, out of
//     [Config.Network]: the first half is for the machine, the second half for
//     the namespaces of RUN steps, which a CNI bridge inside connects. The
//     network namespace has no name and no pin: it goes with the machine's last
//     process, and the veth pair with it, so that nothing can be forgotten.
//   - Its door is a listening socket that is made here and handed to PID 1, so
//     clients need no forwarding rule and no agent to reach it.
//   - Its limits are set on a cgroup in a tree of the provider's own, with v1 and
//     v2 alike; below it the machine makes those of RUN steps.
//   - Its volume is a bind mount, and the volume's lock is a descriptor that
//     only PID 1 holds on to: the lock ends when the machine does.
//
// # What is kept where
//
// State holds one directory for each machine with record.json, written before
// anything else is made and removed after everything else is gone, and the log
// of PID 1. Run is memory: runc's state, bundles, and a small tmpfs for each
// machine with its secrets and, once it ended, exit.json. A record whose boot
// id is not this boot's is of a machine that ended with the host.
//
// # What is dropped
//
// One nft table of the provider's own (firewall.go) masks what leaves machines
// behind the host's address and drops, before any other table can redirect it,
// whatever they send to the host, to each other, to link-local, metadata and
// multicast addresses and to [Config.Deny]. RUN steps and what buildkitd fetches
// itself take the same way out, so both are held to it. Machines have no IPv6.
package local
