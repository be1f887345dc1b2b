package server

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/opendepot/depot/controlplane"
	"github.com/opendepot/depot/controlplane/api/depot/v1/depotv1connect"
)

// APIVersion is the protocol's version, sent in the header of that name.
const (
	APIVersion       = "1"
	APIVersionHeader = "Depot-Api-Version"
)

// rights is the one table that says which right each call needs. A call
// without a row is refused. Rights on a project are checked again, against the
// project that the call names, where it is read.
func rights() map[string]controlplane.Right {
	return map[string]controlplane.Right{
		depotv1connect.BuilderServiceGetBuilderProcedure:   controlplane.RightView,
		depotv1connect.BuilderServiceAcquireLeaseProcedure: controlplane.RightBuild,
		depotv1connect.BuilderServiceRenewLeaseProcedure:   controlplane.RightBuild,
		depotv1connect.BuilderServiceReleaseLeaseProcedure: controlplane.RightBuild,

		depotv1connect.MachineServiceRegisterProcedure:     controlplane.RightNone,
		depotv1connect.MachineServiceSyncMachineProcedure:  controlplane.RightMachine,
		depotv1connect.MachineServiceRenewMachineProcedure: controlplane.RightMachine,

		depotv1connect.AgentServiceJoinProcedure:          controlplane.RightNone,
		depotv1connect.AgentServiceSyncAgentProcedure:     controlplane.RightAgent,
		depotv1connect.AgentServiceRenewIdentityProcedure: controlplane.RightAgent,

		depotv1connect.AdminServiceWhoAmIProcedure:        controlplane.RightKnown,
		depotv1connect.AdminServiceCreateProjectProcedure: controlplane.RightAdmin,
		depotv1connect.AdminServiceListProjectsProcedure:  controlplane.RightView,
		depotv1connect.AdminServiceGetProjectProcedure:    controlplane.RightView,
		depotv1connect.AdminServiceUpdateProjectProcedure: controlplane.RightAdmin,
		depotv1connect.AdminServiceDeleteProjectProcedure: controlplane.RightAdmin,
		depotv1connect.AdminServiceCreateTokenProcedure:   controlplane.RightAdmin,
		depotv1connect.AdminServiceListTokensProcedure:    controlplane.RightAdmin,
		depotv1connect.AdminServiceDeleteTokenProcedure:   controlplane.RightAdmin,
		depotv1connect.AdminServiceListMachinesProcedure:  controlplane.RightView,
		depotv1connect.AdminServiceGetMachineProcedure:    controlplane.RightView,
		depotv1connect.AdminServiceStopMachineProcedure:   controlplane.RightAdmin,
		depotv1connect.AdminServiceListPoolsProcedure:     controlplane.RightView,
		depotv1connect.AdminServiceListAgentsProcedure:    controlplane.RightOperate,
		depotv1connect.AdminServiceDeleteAgentProcedure:   controlplane.RightOperate,
	}
}

// gate is the interceptor that every call passes.
type gate struct{ s *Server }

// WrapUnary checks the protocol's version and the caller, and maps errors.
func (g gate) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	table := rights()
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		begin := time.Now()
		procedure := req.Spec().Procedure
		ctx, err := g.admit(ctx, req, table)
		var resp connect.AnyResponse
		if err == nil {
			resp, err = next(ctx, req)
		}
		if err != nil {
			err = g.s.wireError(ctx, procedure, err)
		}
		g.s.metrics.call(procedure, outcome(ctx, err), time.Since(begin))
		return resp, err
	}
}

// WrapStreamingClient and WrapStreamingHandler are there for the interface:
// the protocol has no streams.
func (g gate) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// WrapStreamingHandler refuses streams.
func (g gate) WrapStreamingHandler(connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(context.Context, connect.StreamingHandlerConn) error {
		return connect.NewError(connect.CodeUnimplemented, errors.New("the protocol has no streams"))
	}
}

func (g gate) admit(ctx context.Context, req connect.AnyRequest, table map[string]controlplane.Right) (context.Context, error) {
	switch v := req.Header().Get(APIVersionHeader); v {
	case APIVersion:
	case "":
		return ctx, controlplane.Errorf(controlplane.Invalid, "the request has no %s header: this is a depot server, use `docker depot` or the depot driver", APIVersionHeader)
	default:
		return ctx, controlplane.Errorf(controlplane.Precondition, "this client speaks version %q of the protocol and server %s speaks version %s: install the same release on both", v, g.s.Version, APIVersion)
	}
	right, ok := table[req.Spec().Procedure]
	if !ok {
		return ctx, controlplane.Errorf(controlplane.Denied, "call %s has no right assigned: this is a fault of the server, report it", req.Spec().Procedure)
	}
	if right == controlplane.RightNone {
		return ctx, nil
	}
	p, err := g.principal(ctx, right)
	if err != nil {
		return ctx, err
	}
	if !p.Has(right) {
		return ctx, controlplane.Errorf(controlplane.Denied, "%s %q may not do this: it needs the right %q", p.Kind, p.Name, right)
	}
	return context.WithValue(ctx, principalKey{}, p), nil
}

func (g gate) principal(ctx context.Context, right controlplane.Right) (controlplane.Principal, error) {
	if p, ok := ctx.Value(identityKey{}).(controlplane.Principal); ok {
		return p, nil
	}
	if right == controlplane.RightMachine || right == controlplane.RightAgent {
		return controlplane.Principal{}, controlplane.Errorf(controlplane.Unauthenticated, "the call shows no certificate of this control plane: a machine gets one by Register, a cloud agent by Join")
	}
	text, _ := ctx.Value(bearerKey{}).(string)
	if text == "" {
		return controlplane.Principal{}, controlplane.Errorf(controlplane.Unauthenticated, "the request carries no token: run `docker depot login`, or set DEPOT_TOKEN")
	}
	return g.s.Authenticator.Token(ctx, text, g.s.Now())
}

type (
	principalKey struct{}
	identityKey  struct{}
	bearerKey    struct{}
)

// caller returns the principal that the gate admitted.
func caller(ctx context.Context) controlplane.Principal {
	p, _ := ctx.Value(principalKey{}).(controlplane.Principal)
	return p
}

// stillKnown refuses a caller whose token was revoked after the gate let the
// call in. A transaction that gives something which outlives the call asks it:
// whoever revokes a token can see, and ends, only what is stored by then.
func stillKnown(ctx context.Context, tx controlplane.Tx) error {
	p := caller(ctx)
	_, err := tx.Token(ctx, p.ID)
	if controlplane.CodeOf(err) == controlplane.NotFound {
		return controlplane.Errorf(controlplane.Unauthenticated, "the token %q was removed: log in again, or use a new token", p.Name)
	}
	return err
}

// withBearer hands the bearer token on to the gate.
func withBearer(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if text, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
			r = r.WithContext(context.WithValue(r.Context(), bearerKey{}, strings.TrimSpace(text)))
		}
		next.ServeHTTP(w, r)
	})
}

// withIdentity hands the principal of a verified client certificate on to the
// gate. Of anybody else, not more is read than it takes to come to have one.
func (s *Server) withIdentity(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var p controlplane.Principal
		if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
			var known bool
			if p, known = s.identity(r.TLS.PeerCertificates[0]); known {
				r = r.WithContext(context.WithValue(r.Context(), identityKey{}, p))
			}
		}
		if p.Kind != controlplane.PrincipalAgent {
			r.Body = http.MaxBytesReader(w, r.Body, maxCallBytes)
		}
		next.ServeHTTP(w, r)
	})
}

// identity reads the principal that a certificate of ours names.
func (s *Server) identity(leaf *x509.Certificate) (controlplane.Principal, bool) {
	if len(leaf.URIs) != 1 {
		return controlplane.Principal{}, false
	}
	uri := leaf.URIs[0].String()
	if id, ok := strings.CutPrefix(uri, identityURI(s.Record.ID, controlplane.PrincipalAgent, "")); ok && controlplane.ValidID(controlplane.KindAgent, id) {
		return controlplane.Principal{Kind: controlplane.PrincipalAgent, ID: id, Name: id}, true
	}
	if id, ok := strings.CutPrefix(uri, identityURI(s.Record.ID, controlplane.PrincipalMachine, "")); ok && controlplane.ValidID(controlplane.KindMachine, id) {
		return controlplane.Principal{Kind: controlplane.PrincipalMachine, ID: id, Name: id}, true
	}
	return controlplane.Principal{}, false
}

// identityURI names an agent or a machine in its identity certificate.
func identityURI(server string, kind controlplane.PrincipalKind, id string) string {
	return fmt.Sprintf("depot://%s/identity/%s/%s", server, kind, id)
}

// wireError maps an error to the wire: the only place that does. An error
// without a code is logged whole, and the caller sees an id to quote.
func (s *Server) wireError(ctx context.Context, procedure string, err error) error {
	var domain *controlplane.Error
	switch {
	case errors.As(err, &domain) && domain.Code != controlplane.Internal:
		return connect.NewError(wireCode(domain.Code), errors.New(domain.Message))
	case gone(ctx):
		// Either nobody listens any more, or this process ends and another will
		// answer: the one who listens tries again (builds-survive).
		return connect.NewError(connect.CodeUnavailable, errors.New("the control plane is stopping: try again"))
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, errors.New("the server took too long: try again"))
	}
	id := hex.EncodeToString(randomBytes(8))
	s.Log.ErrorContext(ctx, "call failed", "procedure", procedure, "principal", caller(ctx).ID, "error_id", id, "err", err)
	return connect.NewError(connect.CodeInternal, fmt.Errorf("internal error %s: the server's log says more under that id", id))
}

// outcome names the end of a call for metrics; a call that its caller cut is no
// failure of the server.
func outcome(ctx context.Context, err error) string {
	switch {
	case err == nil:
		return "ok"
	case gone(ctx):
		return connect.CodeCanceled.String()
	}
	return connect.CodeOf(err).String()
}

func wireCode(c controlplane.Code) connect.Code {
	switch c {
	case controlplane.Invalid:
		return connect.CodeInvalidArgument
	case controlplane.Unauthenticated:
		return connect.CodeUnauthenticated
	case controlplane.Denied:
		return connect.CodePermissionDenied
	case controlplane.NotFound:
		return connect.CodeNotFound
	case controlplane.Exists:
		return connect.CodeAlreadyExists
	case controlplane.Precondition:
		return connect.CodeFailedPrecondition
	case controlplane.Exhausted:
		return connect.CodeResourceExhausted
	case controlplane.Unavailable:
		return connect.CodeUnavailable
	case controlplane.Internal:
	}
	return connect.CodeInternal
}

// recovered turns a panic in a handler into an error without a code, which the
// gate logs and answers.
func recovered(_ context.Context, _ connect.Spec, _ http.Header, p any) error {
	return fmt.Errorf("panic: %v\n%s", p, debug.Stack())
}
