// Package controlplane holds the nouns and rules of depot's control plane:
// what an organization, project, lease, machine and volume are, which states
// they pass through, who may do what, and the seams (Store, Authority) that
// the adapters around it implement. It imports the standard library only.
//
// A build reaches its machine in five stored steps. A client asks for a
// [Lease] on one architecture of a [Project]; the scheduler assigns it a
// [Machine], or stores a new one as [MachinePending] before anything is
// launched (intent-first); a cloud agent launches it on the project's
// [Volume]; the machine registers and becomes [MachineReady]; the lease's poll
// returns the address and a certificate that opens that one machine
// (own-lease).
//
// The rules that must hold under every crash are named in docs/architecture.md
// and quoted in tests: one-writer, intent-first, own-lease, keys-stay,
// builds-survive, no-massacre, untrusted-apart, nothing-lost, say-why.
package controlplane
