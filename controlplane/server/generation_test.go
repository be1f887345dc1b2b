package server_test

import (
	"slices"
	"testing"

	"github.com/opendepot/depot/controlplane"
)

// TestGenerationsExpire starts and stops a project's machine again and again:
// its host keeps the last generations and no more, and nothing is lost.
func TestGenerationsExpire(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	var made []string
	for range 4 {
		d.renew(t)
		d.poll(t)
		m := a.serve(t)
		d.ready(t)
		d.release(t)
		cp.pass(t, controlplane.DefaultIdleTimeout)
		a.stopped(t, m)
		made = append(made, m.launch.GetGenerationId())

		v := a.volumes[m.launch.GetVolumeId()]
		for _, ref := range a.sync(t).GetDeleteGenerations() {
			if ref.GetVolumeId() != v.GetId() {
				t.Fatalf("a generation of volume %s is to be deleted", ref.GetVolumeId())
			}
			v.Generations = slices.DeleteFunc(v.Generations, func(id string) bool { return id == ref.GetGenerationId() })
		}
		if orders := a.sync(t); len(orders.GetDeleteGenerations()) != 0 {
			t.Errorf("still to be deleted: %v", orders.GetDeleteGenerations())
		}
		if want := made[max(0, len(made)-2):]; !slices.Equal(v.GetGenerations(), want) {
			t.Errorf("the host keeps %q, want %q", v.GetGenerations(), want)
		}
	}
	for i, id := range made {
		want := controlplane.GenerationCommitted
		if i < 2 {
			want = controlplane.GenerationExpired
		}
		if got := cp.generationNow(t, id).State; got != want {
			t.Errorf("generation %d is %s, want %s", i, got, want)
		}
	}
}
