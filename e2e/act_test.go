package e2e

import (
	"testing"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/e2e/site"
)

// stopMachine has a machine drain, and waits until nothing of it is left.
func stopMachine(t *testing.T, s *site.Site, id string) {
	t.Helper()
	api := s.Admin(t).Admin
	if _, err := api.StopMachine(t.Context(), &depotv1.StopMachineRequest{Id: id}); err != nil {
		t.Fatalf("stop machine: %v", err)
	}
	site.Eventually(t, "machine "+id+" is gone", func() bool {
		resp, err := api.GetMachine(t.Context(), &depotv1.GetMachineRequest{Id: id})
		if err != nil {
			t.Fatalf("get machine: %v", err)
		}
		return resp.GetMachine().GetGone() != nil
	})
}
