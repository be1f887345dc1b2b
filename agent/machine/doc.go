// Package machine is the agent inside a machine, as its PID 1: it registers
// with the control plane, runs buildkitd on a unix socket, serves mutual TLS
// in front of it, reports what it sees, and drains.
//
// # What it finds when it starts
//
// Whoever launches a machine (a provider, or an image's start-up script) gives
// it the same surroundings:
//
//   - /run/depot (memory, root only): machine.json, the [Config]; join-token,
//     removed once used; relay/controlplane.sock, a unix socket whose other end
//     is the control plane's listener for machines (TLS ends there, not in the
//     relay); state/, where exit.json tells how the machine ended.
//   - file descriptor 3: the listening TCP socket for clients (LISTEN_FDS=1).
//     A second one (LISTEN_FDS=2), if present, is the volume's lock: it is kept
//     open as long as the machine lives, and nothing else is done with it.
//   - /var/lib/buildkit: the volume's live tree, buildkitd's root.
//   - buildkitd, buildkit-runc, git, ssh on PATH; CNI plugins in /opt/cni/bin;
//     /etc/resolv.conf with servers that can be reached from here.
package machine
