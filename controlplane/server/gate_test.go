package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/api/depot/v1/depotv1connect"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/controlplane/server"
	"github.com/opendepot/depot/internal/mtls"
)

// procedures are all calls of the protocol, from its description.
func procedures() map[string]protoreflect.MethodDescriptor {
	all := make(map[string]protoreflect.MethodDescriptor)
	for _, f := range []protoreflect.FileDescriptor{
		depotv1.File_depot_v1_builder_proto, depotv1.File_depot_v1_machine_proto,
		depotv1.File_depot_v1_agent_proto, depotv1.File_depot_v1_admin_proto,
	} {
		for i := range f.Services().Len() {
			for j := range f.Services().Get(i).Methods().Len() {
				m := f.Services().Get(i).Methods().Get(j)
				all["/"+string(m.Parent().FullName())+"/"+string(m.Name())] = m
			}
		}
	}
	return all
}

// TestGateTable holds the table of rights to the protocol: no call without a
// row, no row without a call.
func TestGateTable(t *testing.T) {
	t.Parallel()
	want := slices.Sorted(maps.Keys(procedures()))
	got := slices.Sorted(maps.Keys(server.Rights()))
	if !slices.Equal(want, got) {
		t.Errorf("the protocol has %q, the table %q", want, got)
	}
	if len(want) < 25 {
		t.Errorf("%d procedures found", len(want))
	}
	for procedure, right := range server.Rights() {
		service := strings.Split(procedure, "/")[1]
		free := procedure == depotv1connect.MachineServiceRegisterProcedure || procedure == depotv1connect.AgentServiceJoinProcedure
		switch {
		case free != (right == controlplane.RightNone):
			t.Errorf("%s needs the right %q", procedure, right)
		case service == depotv1connect.MachineServiceName && !free && right != controlplane.RightMachine,
			service == depotv1connect.AgentServiceName && !free && right != controlplane.RightAgent:
			t.Errorf("%s is for its own kind of caller, and needs %q", procedure, right)
		}
	}
}

// wire is a bare HTTP client of one listener.
type wire struct {
	http   *http.Client
	header http.Header
}

func forAgents(procedure string) bool {
	return strings.Contains(procedure, depotv1connect.MachineServiceName) || strings.Contains(procedure, depotv1connect.AgentServiceName)
}

// wire returns one for the listener that serves the procedure.
func (cp *controlPlane) wire(tb testing.TB, procedure string, identity *mtls.Identity) wire {
	tb.Helper()
	addr := func() string { return cp.clientAddr }
	if forAgents(procedure) {
		addr = func() string { return cp.agentAddr }
	}
	transport := &http.Transport{
		DialContext:       cp.dial(addr),
		ForceAttemptHTTP2: true,
		TLSClientConfig:   mtls.Client{Identity: identity, Pin: cp.pin, ServerName: client.PinnedName}.Config(),
	}
	tb.Cleanup(transport.CloseIdleConnections)
	return wire{
		http:   &http.Client{Transport: transport},
		header: http.Header{"Content-Type": {"application/proto"}, server.APIVersionHeader: {server.APIVersion}},
	}
}

// post sends a body as it is, and returns the code and message of the answer;
// no code means that the call succeeded.
func (w wire) post(ctx context.Context, tb testing.TB, procedure string, body []byte) (code, message string) {
	tb.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://test"+procedure, bytes.NewReader(body))
	must(tb, err)
	req.Header = w.header
	resp, err := w.http.Do(req)
	must(tb, err)
	defer resp.Body.Close() //nolint:errcheck // it was read
	text, err := io.ReadAll(resp.Body)
	must(tb, err)
	if resp.StatusCode == http.StatusOK {
		return "", ""
	}
	var answer struct{ Code, Message string }
	if err := json.Unmarshal(text, &answer); err != nil || answer.Code == "" || answer.Message == "" {
		tb.Fatalf("%s: status %d with %q, which is no answer of the protocol", procedure, resp.StatusCode, text)
	}
	return answer.Code, answer.Message
}

// TestGateRefuses sends every call without what it needs.
func TestGateRefuses(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	unknown := cp.token(t, &depotv1.CreateTokenRequest{Kind: "user", Name: "gone", Role: "admin"})
	made := cp.client(t, unknown)
	me, err := made.Admin.WhoAmI(t.Context(), &depotv1.WhoAmIRequest{})
	must(t, err)
	_, err = made.Admin.DeleteToken(t.Context(), &depotv1.DeleteTokenRequest{Id: me.GetPrincipalId()})
	must(t, err)
	for name, c := range map[string]struct {
		change func(http.Header)
		code   connect.Code
		words  []string
	}{
		"no version":      {func(h http.Header) { h.Del(server.APIVersionHeader) }, connect.CodeInvalidArgument, []string{server.APIVersionHeader, "docker depot"}},
		"another version": {func(h http.Header) { h.Set(server.APIVersionHeader, "2") }, connect.CodeFailedPrecondition, []string{`"2"`, "version 1", "same release"}},
		"no token":        {func(http.Header) {}, connect.CodeUnauthenticated, nil},
		"no such token":   {func(h http.Header) { h.Set("Authorization", "Bearer "+unknown) }, connect.CodeUnauthenticated, nil},
		"no token at all": {func(h http.Header) { h.Set("Authorization", "Bearer nonsense") }, connect.CodeUnauthenticated, nil},
		"another scheme":  {func(h http.Header) { h.Set("Authorization", "Basic "+cp.operator) }, connect.CodeUnauthenticated, nil},
	} {
		t.Run(name, func(t *testing.T) {
			clients, agents := cp.wire(t, "", nil), cp.wire(t, depotv1connect.AgentServiceName, nil)
			c.change(clients.header)
			c.change(agents.header)
			for procedure := range procedures() {
				w := clients
				if forAgents(procedure) {
					w = agents
				}
				code, message := w.post(t.Context(), t, procedure, nil)
				if code != c.code.String() {
					t.Errorf("%s: %s (%s), want %s", procedure, code, message, c.code)
				}
				has(t, message, c.words...)
			}
		})
	}
	// The same with a good token and nothing else is let through.
	w := cp.wire(t, "", nil)
	w.header.Set("Authorization", "Bearer "+cp.operator)
	if code, message := w.post(t.Context(), t, depotv1connect.AdminServiceWhoAmIProcedure, nil); code != "" {
		t.Errorf("refused with %s: %s", code, message)
	}
}

// TestRights has each kind of principal make each call about one project, and
// compares what it is told with a table.
func TestRights(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	id, _ := cp.project(t, "web", nil)
	api, _ := cp.project(t, "api", nil)
	cp.update(t, func(tx controlplane.Tx) error {
		return tx.PutOrganization(t.Context(), controlplane.Organization{ID: "org_" + newLeaseID()[4:], Name: "evil", Created: cp.now()})
	})
	web := &depotv1.ProjectRef{Id: id}
	cp.agent(t, "host-1", pool(1))
	busy := cp.driver(t, cp.token(t, &depotv1.CreateTokenRequest{Kind: "project", Name: "busy", Project: web}))
	busy.waits(t, "is being launched") // a project with a lease is not deleted
	ended := controlplane.Machine{
		ID: "mch_" + newLeaseID()[4:], Project: id, Arch: "amd64", State: controlplane.MachineStopped, Created: cp.now(), Gone: cp.now(),
	}
	cp.update(t, func(tx controlplane.Tx) error { return tx.PutMachine(t.Context(), ended) })
	user := func(role, org string) string {
		return cp.token(t, &depotv1.CreateTokenRequest{Kind: "user", Name: role, Role: role, Project: &depotv1.ProjectRef{Organization: org}})
	}
	project := func(role, project string) string {
		return cp.token(t, &depotv1.CreateTokenRequest{Kind: "project", Name: role, Role: role, Project: &depotv1.ProjectRef{Id: project}})
	}
	var callers []*client.Client
	for _, token := range []string{
		cp.operator, user("admin", "acme"), user("builder", "acme"), user("viewer", "acme"),
		project("admin", id), project("builder", id), project("viewer", id),
		user("admin", "evil"), project("admin", api),
	} {
		callers = append(callers, cp.client(t, token))
	}
	codes := map[byte]connect.Code{
		'd': connect.CodePermissionDenied, 'n': connect.CodeNotFound, 'p': connect.CodeFailedPrecondition,
	}
	number := 0
	_, csr := newKey(t)
	// One letter per caller, as listed above: the operator; an organization's
	// admin, builder and viewer; a project's admin, builder and viewer; an
	// admin of another organization; an admin of another project. A dot is
	// success; what is refused for its content alone was let through.
	for procedure, row := range map[string]struct {
		want string
		call func(context.Context, *client.Client) error
	}{
		"GetBuilder": {".......nn", func(ctx context.Context, c *client.Client) error {
			_, err := c.Builder.GetBuilder(ctx, &depotv1.GetBuilderRequest{Project: web})
			return err
		}},
		"AcquireLease": {"pppdppdnn", func(ctx context.Context, c *client.Client) error {
			_, err := c.Builder.AcquireLease(ctx, &depotv1.AcquireLeaseRequest{LeaseId: newLeaseID(), Project: web, Arch: "amd64", Csr: csr})
			return err
		}},
		"RenewLease": {"nnndnndnn", func(ctx context.Context, c *client.Client) error {
			_, err := c.Builder.RenewLease(ctx, &depotv1.RenewLeaseRequest{LeaseId: busy.lease()})
			return err
		}},
		"ReleaseLease": {"...d..d..", func(ctx context.Context, c *client.Client) error {
			_, err := c.Builder.ReleaseLease(ctx, &depotv1.ReleaseLeaseRequest{LeaseId: busy.lease()})
			return err
		}},
		"WhoAmI": {".........", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.WhoAmI(ctx, &depotv1.WhoAmIRequest{})
			return err
		}},
		"CreateProject": {"..ddddddd", func(ctx context.Context, c *client.Client) error {
			number++
			_, err := c.Admin.CreateProject(ctx, &depotv1.CreateProjectRequest{Organization: "acme", Name: fmt.Sprintf("new-%d", number)})
			if connect.CodeOf(err) == connect.CodeNotFound { // another organization's is not told from none
				return connect.NewError(connect.CodePermissionDenied, err)
			}
			return err
		}},
		"ListProjects": {".........", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.ListProjects(ctx, &depotv1.ListProjectsRequest{})
			return err
		}},
		"GetProject": {".......nn", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.GetProject(ctx, &depotv1.GetProjectRequest{Project: web})
			return err
		}},
		"UpdateProject": {"..dd.ddnn", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.UpdateProject(ctx, &depotv1.UpdateProjectRequest{Project: web})
			return err
		}},
		"DeleteProject": {"ppddddd" + "nn", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.DeleteProject(ctx, &depotv1.DeleteProjectRequest{Project: web})
			return err
		}},
		"CreateToken": {"..dd.ddnn", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.CreateToken(ctx, &depotv1.CreateTokenRequest{Kind: "project", Project: web})
			return err
		}},
		"CreateToken for users": {"..ddddddd", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.CreateToken(ctx, &depotv1.CreateTokenRequest{Kind: "user", Project: &depotv1.ProjectRef{Organization: "acme"}})
			if connect.CodeOf(err) == connect.CodeNotFound {
				return connect.NewError(connect.CodePermissionDenied, err)
			}
			return err
		}},
		"CreateToken for agents": {".dddddddd", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.CreateToken(ctx, &depotv1.CreateTokenRequest{Kind: "agent"})
			return err
		}},
		"ListTokens": {"..dd.ddnn", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.ListTokens(ctx, &depotv1.ListTokensRequest{Project: web})
			return err
		}},
		"DeleteToken": {"nnddnddnn", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.DeleteToken(ctx, &depotv1.DeleteTokenRequest{Id: "tok_none"})
			return err
		}},
		"ListMachines": {".......nn", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.ListMachines(ctx, &depotv1.ListMachinesRequest{Project: web})
			return err
		}},
		"GetMachine": {".......nn", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.GetMachine(ctx, &depotv1.GetMachineRequest{Id: ended.ID})
			return err
		}},
		"StopMachine": {"..dd.ddnn", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.StopMachine(ctx, &depotv1.StopMachineRequest{Id: ended.ID})
			return err
		}},
		"ListPools": {".........", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.ListPools(ctx, &depotv1.ListPoolsRequest{})
			return err
		}},
		"ListAgents": {".dddddddd", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.ListAgents(ctx, &depotv1.ListAgentsRequest{})
			return err
		}},
		"DeleteAgent": {"ndddddddd", func(ctx context.Context, c *client.Client) error {
			_, err := c.Admin.DeleteAgent(ctx, &depotv1.DeleteAgentRequest{Id: "agt_none"})
			return err
		}},
	} {
		t.Run(procedure, func(t *testing.T) {
			for i, c := range callers {
				err := row.call(t.Context(), c)
				switch want := row.want[i]; {
				case want == '.' && err != nil:
					t.Errorf("caller %d of %s is refused: %v", i, row.want, err)
				case want != '.' && connect.CodeOf(err) != codes[want]:
					t.Errorf("caller %d of %s: got %v, want %s", i, row.want, err, codes[want])
				}
			}
		})
	}
	cp.lives(t, busy)
}

// TestUnseen asks by name and by id for what the caller may not see: it cannot
// tell it from what does not exist.
func TestUnseen(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	id, _ := cp.project(t, "web", nil)
	_, other := cp.project(t, "api", nil)
	cp.update(t, func(tx controlplane.Tx) error {
		return tx.PutOrganization(t.Context(), controlplane.Organization{ID: "org_" + newLeaseID()[4:], Name: "evil", Created: cp.now()})
	})
	foreign := cp.token(t, &depotv1.CreateTokenRequest{Kind: "user", Role: "admin", Project: &depotv1.ProjectRef{Organization: "evil"}})
	ask := func(c *client.Client, ref *depotv1.ProjectRef) string {
		_, err := c.Builder.GetBuilder(t.Context(), &depotv1.GetBuilderRequest{Project: ref})
		refused(t, err, connect.CodeNotFound)
		return message(err)
	}
	missing := "prj_" + newLeaseID()[4:]
	for name, token := range map[string]string{"another organization": foreign, "another project": other} {
		t.Run(name, func(t *testing.T) {
			c := cp.client(t, token)
			for _, pair := range [][2]*depotv1.ProjectRef{
				{{Id: id}, {Id: missing}},
				{{Organization: "acme", Name: "web"}, {Organization: "acme", Name: "nope"}},
				{{Organization: "acme", Name: "web"}, {Organization: "nope", Name: "web"}},
			} {
				there, not := ask(c, pair[0]), ask(c, pair[1])
				named := func(r *depotv1.ProjectRef) string {
					if r.GetId() != "" {
						return r.GetId()
					}
					return r.GetOrganization() + "/" + r.GetName()
				}
				if strings.ReplaceAll(there, named(pair[0]), "X") != strings.ReplaceAll(not, named(pair[1]), "X") {
					t.Errorf("what is hidden: %q, what is not: %q", there, not)
				}
			}
		})
	}
	t.Run("organizations", func(t *testing.T) {
		c := cp.client(t, foreign).Admin
		for name, call := range map[string]func(org string) error{
			"CreateProject": func(org string) error {
				_, err := c.CreateProject(t.Context(), &depotv1.CreateProjectRequest{Organization: org, Name: "x"})
				return err
			},
			"ListProjects": func(org string) error {
				_, err := c.ListProjects(t.Context(), &depotv1.ListProjectsRequest{Organization: org})
				return err
			},
			"CreateToken": func(org string) error {
				_, err := c.CreateToken(t.Context(), &depotv1.CreateTokenRequest{Kind: "user", Project: &depotv1.ProjectRef{Organization: org}})
				return err
			},
		} {
			there, not := call("acme"), call("nope")
			if connect.CodeOf(there) != connect.CodeOf(not) || there == nil || not == nil {
				t.Errorf("%s tells a hidden organization (%v) from none (%v)", name, there, not)
			}
		}
	})
	t.Run("machines", func(t *testing.T) {
		hidden := controlplane.Machine{ID: "mch_" + newLeaseID()[4:], Project: id, Arch: "amd64", State: controlplane.MachineStopped, Gone: cp.now()}
		cp.update(t, func(tx controlplane.Tx) error { return tx.PutMachine(t.Context(), hidden) })
		none := "mch_" + newLeaseID()[4:]
		c := cp.client(t, other).Admin
		_, there := c.GetMachine(t.Context(), &depotv1.GetMachineRequest{Id: hidden.ID})
		_, not := c.GetMachine(t.Context(), &depotv1.GetMachineRequest{Id: none})
		if strings.ReplaceAll(message(there), hidden.ID, none) != message(not) {
			t.Errorf("what is hidden: %v, what is not: %v", there, not)
		}
		all, err := c.ListMachines(t.Context(), &depotv1.ListMachinesRequest{All: true})
		must(t, err)
		if len(all.GetMachines()) > 0 {
			t.Errorf("listed: %v", all)
		}
	})
}
