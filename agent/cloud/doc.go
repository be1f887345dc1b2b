// Package cloud is the agent that launches machines and keeps volumes in its
// pools: the loop between one control plane and any number of providers.
//
// An [Agent] joins its control plane once, with a one-time token, and from then
// on goes round and round:
//
//	observe: what do the providers and volume stores list?
//	sync:    report all of it; the answer, which may hang, is all of the orders
//	act:     per object, do the next thing that brings it closer to its order
//
// The loop is level-triggered: it keeps no queue of things to do, and decides
// anew at each turn from what it sees and what is ordered now. Everything it
// must not forget is on disk, in its [State] directory, or on the host, found
// by the providers. So it may be killed at any point and started again, and
// machines never notice (builds-survive).
//
// What it never does, whatever the control plane says or fails to say:
//
//   - Touch an object that no order names (no-massacre). Absence is not an
//     order; unknown objects are reported and left alone. Objects that carry
//     another control plane's id are not even reported.
//   - Obey another control plane than the one it joined, or one whose epoch is
//     lower than the highest seen: a restored backup that must not command yet.
//   - Launch a machine twice. Each launch is noted before it is begun, and each
//     end before its traces are removed (intent-first).
//   - Report the clean end of a machine before its generation is committed
//     (nothing-lost).
//   - Report a part of what there is: while a provider cannot be listed, its
//     part of the last full report stands, and its pools are closed.
package cloud
