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
//   - /sys/fs/cgroup, writable: the machine's cgroup, in a namespace of its own,
//     limited from outside. The agent divides it (cgroup.go): with version 2 it
//     moves to the leaf init, where the launcher finds how it ended.
//   - standard error: the log, of which a file keeps the beginning and the end.
//   - buildkitd, buildkit-runc, git, ssh on PATH; CNI plugins in /opt/cni/bin;
//     /etc/resolv.conf with servers that can be reached from here.
//
// # Its life
//
// [Run] makes a key that never leaves the process (keys-stay), trades the join
// token for two certificates, and starts buildkitd. Once that lists its workers
// the front lets clients in: those whose certificate names this machine and a
// lease that has not ended (own-lease). Before and after, a client is reset at
// once, for the listening socket is the launcher's and outlives the machine: in
// its backlog a client would wait for nobody.
//
// One hanging call, SyncMachine, carries everything afterwards. Whatever
// changes here cuts the call and makes the next; whatever the control plane
// wants arrives as a directive, all of it each time. A control plane that does
// not answer changes nothing for those who build (builds-survive); one that
// does not answer for an hour, while nobody builds, ends the machine in order.
//
// # Its end
//
// A machine drains: nobody is let in any more, the connections that are open
// are waited for (or cut, if it is to end now), buildkitd gets TERM, and what
// it wrote is made durable. Only if buildkitd ended by that TERM and in time is
// the end clean, and the volume's tree fit to become a generation. Everything
// else, be it buildkitd's own end or a registration that failed, is unclean and
// says why, in exit.json and in the last report. A machine that is killed
// leaves no exit.json, which tells enough.
package machine
