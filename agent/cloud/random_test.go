package cloud

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/opendepot/depot/agent/provider"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// event is one thing that happens; what it needs of the rest depends on its kind.
type event struct {
	kind            string
	machine, volume int
	coin            bool
	call            string
	seconds, millis int
}

func events() *rapid.Generator[[]event] {
	kinds := []string{"run", "run", "stop", "destroy", "forget", "again", "exit", "restart", "reboot", "fail", "mend", "away", "wait"}
	calls := []string{"launch", "ensure", "commit", "destroy", "list", "list_volumes", "stop"}
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) event {
		return event{
			kind: rapid.SampledFrom(kinds).Draw(t, "kind"), machine: rapid.IntRange(0, 99).Draw(t, "machine"),
			volume: rapid.IntRange(1, 3).Draw(t, "volume"), coin: rapid.Bool().Draw(t, "coin"),
			call: rapid.SampledFrom(calls).Draw(t, "call"), seconds: rapid.IntRange(1, 90).Draw(t, "seconds"),
			millis: rapid.IntRange(0, 3000).Draw(t, "millis"),
		}
	}), 1, 40)
}

// chaos drives one agent after another through what may befall them, and knows
// what was ever ordered.
type chaos struct {
	*rig
	agent     *Agent
	state     *State
	cancel    context.CancelFunc
	done      chan error
	orders    map[string]*depotv1.MachineOrder
	destroyed map[string]bool // was ever ordered to be
	clean     map[string]bool // ended cleanly
	next      int
	broken    string
	failed    bool // a stop may have been tried in vain
}

func (c *chaos) begin() {
	state, err := OpenState(c.dir)
	must(c.t, err)
	agent, err := New(c.config(state))
	must(c.t, err)
	ctx, cancel := context.WithCancel(c.t.Context())
	c.agent, c.state, c.cancel, c.done = agent, state, cancel, make(chan error, 1)
	go func() { c.done <- agent.Run(ctx) }()
}

func (c *chaos) end() {
	c.cancel()
	if err := errors.Join(<-c.done, c.state.Close()); err != nil {
		c.breach("the agent ended with %v", err)
	}
}

func (c *chaos) publish() {
	var all []*depotv1.MachineOrder
	for _, o := range c.orders {
		all = append(all, o)
	}
	c.order(all...)
}

// happen lets one thing happen.
func (c *chaos) happen(e event) {
	n := 0
	if c.next > 0 {
		n = e.machine%c.next + 1
	}
	m := id("mch", n) // nobody's, if n is 0
	switch e.kind {
	case "run":
		c.next++
		c.orders[id("mch", c.next)] = run(c.next, e.volume)
	case "again": // a control plane that was restored orders what was before
		if n > 0 {
			c.orders[m] = run(n, e.volume)
		}
	case "stop":
		if n > 0 {
			c.orders[m] = toStop(n)
		}
	case "destroy":
		c.orders[m] = &depotv1.MachineOrder{Id: m, Action: depotv1.MachineOrder_ACTION_DESTROY}
		c.destroyed[m] = true
	case "forget":
		delete(c.orders, m)
	case "exit":
		if look(c.host, func(h *host) bool { i := h.machines[m]; return i != nil && i.State == provider.Running }) {
			c.clean[m] = e.coin
			c.host.exit(m, provider.Exit{Clean: e.coin})
		}
	case "restart":
		c.end()
		c.begin()
	case "reboot":
		c.end()
		for lost := range look(c.host, func(h *host) map[string]*provider.Instance { return h.machines }) {
			c.destroyed[lost] = true // by the reboot
		}
		c.host.reboot()
		c.begin()
	case "fail":
		c.failed = c.failed || e.call == "stop"
		c.host.set(func(h *host) { h.fail[e.call] = errors.New("chaos") })
	case "mend":
		c.host.set(func(h *host) { clear(h.fail) })
	case "away":
		c.stop()
		pass(c.t, 7*time.Second)
		c.start()
	case "wait":
		pass(c.t, time.Duration(e.seconds)*time.Second)
	}
	c.publish()
	pass(c.t, time.Duration(e.millis)*time.Millisecond)
}

// breach notes the first thing that must not be.
func (c *chaos) breach(format string, args ...any) {
	if c.broken == "" {
		c.broken = fmt.Sprintf(format, args...)
	}
}

// check asserts what must hold at any moment.
func (c *chaos) check() {
	c.host.mu.Lock()
	defer c.host.mu.Unlock()
	writers := map[string]string{}
	for n := 1; n <= c.next; n++ {
		m := id("mch", n)
		if c.host.started[m] > 1 {
			c.breach("%s was launched %d times", m, c.host.started[m])
		}
		if c.host.stops[m] > 1 && !c.failed {
			c.breach("%s was stopped %d times", m, c.host.stops[m])
		}
		in := c.host.machines[m]
		if c.host.started[m] > 0 && in == nil && !c.destroyed[m] {
			c.breach("%s was removed, and nobody had ordered that (no-massacre)", m)
		}
		if in != nil && in.State == provider.Running {
			if other := writers[in.Volume]; other != "" {
				c.breach("%s and %s write %s (one-writer)", other, m, in.Volume)
			}
			writers[in.Volume] = m
		}
		for _, v := range c.host.volumes {
			committed := slices.ContainsFunc(v.Generations, func(g provider.Generation) bool { return g.ID == id("gen", n) })
			if committed && !c.clean[m] {
				c.breach("the dirty tree of %s was committed", m)
			}
		}
	}
}

// reported asserts that what is said to the control plane is true.
func (c *chaos) reported() {
	for _, o := range get(c.server, func(s *server) *depotv1.SyncAgentRequest { return s.report }).GetMachines() {
		if o.GetState() != exited {
			continue
		}
		in := look(c.host, func(h *host) *provider.Instance { return h.machines[o.GetId()] })
		if in != nil && in.State == provider.Running {
			c.breach("%s runs, and is reported as ended", o.GetId())
		}
		if g := o.GetGenerationId(); g != "" && !look(c.host, func(h *host) bool {
			v := h.volumes[o.GetVolumeId()]
			return v != nil && slices.ContainsFunc(v.Generations, func(x provider.Generation) bool { return x.ID == g })
		}) {
			c.breach("%s is reported committed, and is not durable", g)
		}
	}
}

// Whatever happens in whatever order, the invariants hold, and in the end the
// orders are obeyed.
func TestInvariantsUnderChaos(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		broken, story := "", events().Draw(rt, "events")
		synctest.Test(t, func(t *testing.T) {
			c := &chaos{
				rig: newRig(t), orders: map[string]*depotv1.MachineOrder{}, destroyed: map[string]bool{}, clean: map[string]bool{},
			}
			c.quiet = true
			c.begin()
			defer func() { broken = c.broken }()
			for _, e := range story {
				if c.broken != "" {
					break
				}
				c.happen(e)
				c.check()
				c.reported()
			}
			c.host.set(func(h *host) { clear(h.fail) })
			for m := range c.orders {
				c.orders[m] = &depotv1.MachineOrder{Id: m, Action: depotv1.MachineOrder_ACTION_DESTROY}
				c.destroyed[m] = true
			}
			c.publish()
			until(t, "all that was ordered away is gone", func() bool {
				return !look(c.host, func(h *host) bool {
					return slices.ContainsFunc(slices.Collect(maps.Keys(h.machines)), func(m string) bool { return c.orders[m] != nil })
				})
			})
			c.check()
			c.end()
		})
		if broken != "" {
			rt.Fatal(broken)
		}
	})
}
