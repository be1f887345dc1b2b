package server_test

import (
	"context"
	"encoding/json"
	"math"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/api/depot/v1/depotv1connect"
	"github.com/opendepot/depot/controlplane/server"
	"github.com/opendepot/depot/controlplane/store"
)

// broken calls a server that lacks a part, as the operator, and returns the
// code and message of its answer.
func (cp *controlPlane) broken(tb testing.TB, procedure string, req proto.Message, breakIt func(*server.Config)) (code, message string) {
	tb.Helper()
	config := cp.server.Config
	breakIt(&config)
	body, err := proto.Marshal(req)
	must(tb, err)
	r := httptest.NewRequestWithContext(tb.Context(), http.MethodPost, procedure, strings.NewReader(string(body)))
	r.Header = http.Header{
		"Content-Type": {"application/proto"}, server.APIVersionHeader: {server.APIVersion}, "Authorization": {"Bearer " + cp.operator},
	}
	w := httptest.NewRecorder()
	server.New(config).Clients().ServeHTTP(w, r)
	var answer struct{ Code, Message string }
	must(tb, json.Unmarshal(w.Body.Bytes(), &answer))
	return answer.Code, answer.Message
}

// onlyID checks that the caller of a call that failed inside sees an id and
// nothing else, and that the log has the cause, once, under that id.
func onlyID(tb testing.TB, cp *controlPlane, code, message, cause string) {
	tb.Helper()
	id := regexp.MustCompile(`^internal error ([0-9a-f]{16}): the server's log says more under that id$`).FindStringSubmatch(message)
	if code != connect.CodeInternal.String() || id == nil {
		tb.Fatalf("the caller sees %s: %q", code, message)
	}
	var lines []string
	for line := range strings.Lines(cp.log.String()) {
		if strings.Contains(line, "call failed") {
			lines = append(lines, line)
		}
	}
	if len(lines) != 1 {
		tb.Fatalf("the log has %d lines about one failure: %q", len(lines), lines)
	}
	has(tb, lines[0], "error_id="+id[1], cause)
}

// TestSayWhyInternal has the store fail under a call.
func TestSayWhyInternal(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	closed, err := store.Open(t.Context(), store.Config{Path: filepath.Join(t.TempDir(), "depot.db"), Logger: cp.server.Log})
	must(t, err)
	must(t, closed.Close())
	code, message := cp.broken(t, depotv1connect.AdminServiceListPoolsProcedure, &depotv1.ListPoolsRequest{}, func(c *server.Config) { c.Store = closed })
	onlyID(t, cp, code, message, "closed")
}

// TestSayWhyPanic has a handler panic.
func TestSayWhyPanic(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	req := &depotv1.AcquireLeaseRequest{LeaseId: newLeaseID(), Arch: "amd64"}
	code, message := cp.broken(t, depotv1connect.BuilderServiceAcquireLeaseProcedure, req, func(c *server.Config) { c.Authority = nil })
	onlyID(t, cp, code, message, "nil pointer")
	has(t, cp.log.String(), "builder.go") // where it was
}

// TestSayWhyNotReady asks a control plane whose store is gone.
func TestSayWhyNotReady(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	cp.stop(t)
	status, _ := cp.readyz(t)
	if status != http.StatusServiceUnavailable {
		t.Errorf("readyz without a store: %d", status)
	}
	cp.start(t)
	if status, body := cp.readyz(t); status != http.StatusOK {
		t.Errorf("readyz: %d %s", status, body)
	}
}

// credentials returns what gets a procedure's requests past the gate.
func credentials(tb testing.TB, cp *controlPlane, a *agent, m *machine, procedure string) wire {
	tb.Helper()
	switch {
	case strings.Contains(procedure, "AgentService"):
		return cp.wire(tb, procedure, a.identity)
	case strings.Contains(procedure, "MachineService"):
		return cp.wire(tb, procedure, m.identity)
	}
	w := cp.wire(tb, procedure, nil)
	w.header.Set("Authorization", "Bearer "+cp.operator)
	return w
}

// TestSayWhyBadInput sends every call random bytes, random messages and far too
// much: each is answered, and none as a fault of the server.
func TestSayWhyBadInput(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t, func(times *controlplane.Times) { times.Hang, times.LeaseRenew = time.Millisecond, time.Millisecond })
	id, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	d.waits(t, "is being launched")
	m := a.serve(t)
	d.ready(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // input for tests, to be repeated by its seed
	known := []string{
		id, a.id, m.id, d.lease(), m.launch.GetVolumeId(), m.launch.GetGenerationId(), m.launch.GetJoinToken(),
		"acme", "web", "default", "amd64", "arm64", "user", "project", "agent", "admin", "viewer", "r1",
	}
	for procedure, method := range procedures() {
		w := credentials(t, cp, a, m, procedure)
		input, err := protoregistry.GlobalTypes.FindMessageByName(method.Input().FullName())
		must(t, err)
		for i := range 30 {
			var body []byte
			if i%3 == 0 {
				body = randomBytes(random, random.IntN(200))
			} else {
				msg := input.New()
				fill(random, msg, known, 0)
				body, err = proto.Marshal(msg.Interface())
				must(t, err)
			}
			answered(t, w, procedure, body)
		}
	}
	for _, procedure := range []string{depotv1connect.AdminServiceWhoAmIProcedure, depotv1connect.AgentServiceJoinProcedure} {
		w := credentials(t, cp, a, m, procedure)
		if code, message := w.post(t.Context(), t, procedure, make([]byte, 9<<20)); code != connect.CodeResourceExhausted.String() {
			t.Errorf("%s takes 9 MB: %s %s", procedure, code, message)
		}
	}
	if strings.Contains(cp.log.String(), "panic") {
		t.Error("a handler panicked")
	}
	// The server serves on.
	_, err := cp.admin(t).Admin.CreateProject(t.Context(), &depotv1.CreateProjectRequest{Organization: "acme", Name: "afterwards"})
	must(t, err)
}

// answered sends a body and checks that what is wrong with it is not taken for
// a fault of the server.
func answered(tb testing.TB, w wire, procedure string, body []byte) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), patience)
	defer cancel()
	code, message := w.post(ctx, tb, procedure, body)
	switch code {
	case connect.CodeInternal.String(), connect.CodeUnknown.String(), connect.CodeUnavailable.String():
		tb.Errorf("%s: %x is answered %s: %s", procedure, body, code, message)
	}
}

func randomBytes(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32()) //nolint:gosec // the low bits are as random
	}
	return b
}

// fill sets about half of a message's fields to something.
func fill(r *rand.Rand, m protoreflect.Message, known []string, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case r.IntN(2) == 0 || depth > 3:
		case f.IsList():
			list := m.Mutable(f).List()
			for range r.IntN(4) {
				if f.Message() != nil {
					e := list.NewElement()
					fill(r, e.Message(), known, depth+1)
					list.Append(e)
				} else {
					list.Append(value(r, f, known))
				}
			}
		case f.Message() != nil:
			fill(r, m.Mutable(f).Message(), known, depth+1)
		default:
			m.Set(f, value(r, f, known))
		}
	}
}

// value returns a scalar, chosen for the trouble that it makes.
func value(r *rand.Rand, f protoreflect.FieldDescriptor, known []string) protoreflect.Value {
	whole := []int64{0, 1, -1, 7, math.MaxInt32, math.MinInt32, math.MaxInt64, math.MinInt64, r.Int64()}[r.IntN(9)]
	switch f.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(r.IntN(2) == 0)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(r.IntN(9) - 1)) //nolint:gosec // small
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(whole)) //nolint:gosec // any will do
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(whole)
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(uint64(whole)) //nolint:gosec // any will do
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes(randomBytes(r, r.IntN(300)))
	default:
		odd := []string{"", " ", "../../etc/passwd", "'; DROP TABLE leases; --", "\x00", "\n\n", "%s%n", "ü€😀", strings.Repeat("x", 5000), "lse_", "depot_user__"}
		if r.IntN(3) > 0 {
			odd = known
		}
		return protoreflect.ValueOfString(odd[r.IntN(len(odd))])
	}
}

// TestSayWhyRanges sends values that are well formed and cannot be.
func TestSayWhyRanges(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	a := cp.agent(t, "host-1", pool(1))
	a.report.Pools = []*depotv1.Pool{pool(1), pool(2)}
	_, err := a.call(t.Context(), 0)
	refused(t, err, connect.CodeInvalidArgument, `"main"`)
	w := cp.wire(t, "", nil)
	w.header.Set("Authorization", "Bearer "+cp.operator)
	for _, seconds := range []int64{math.MinInt64, -1, 0, 250 * 365 * 24 * 3600, math.MaxInt64} {
		req := &depotv1.CreateTokenRequest{Kind: "agent", Lifetime: &durationpb.Duration{Seconds: seconds}}
		body, err := proto.Marshal(req)
		must(t, err)
		code, message := w.post(t.Context(), t, depotv1connect.AdminServiceCreateTokenProcedure, body)
		if code != connect.CodeInvalidArgument.String() {
			t.Errorf("a lifetime of %d s is answered %s: %s", seconds, code, message)
		}
		has(t, message, "lifetime")
	}
}
