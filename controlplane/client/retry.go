package client

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"

	"github.com/opendepot/depot/controlplane/api/depot/v1/depotv1connect"
)

// strict refuses answers that no control plane gives, before anything tries to
// read them: a web page, a bare 404. What a proxy says about a server that it
// cannot reach passes as "unavailable".
type strict struct{ next http.RoundTripper }

// RoundTrip sends one request.
func (s strict) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := s.next.RoundTrip(req)
	switch {
	case err != nil:
		if !repeatable(req) && !unsent(err) {
			return nil, &onceError{err}
		}
		return nil, err
	case fromDepot(resp), gatewayFault(resp):
		return resp, nil
	default:
		resp.Body.Close() //nolint:errcheck,gosec // nothing of it is wanted
		return nil, &notDepotError{status: resp.StatusCode, contentType: resp.Header.Get("Content-Type")}
	}
}

// fromDepot reports whether resp is in the Connect protocol: protobuf for an
// answer, JSON for an error.
func fromDepot(resp *http.Response) bool {
	kind, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	switch kind {
	case "application/proto":
		return resp.StatusCode == http.StatusOK
	case "application/json":
		return resp.StatusCode != http.StatusOK
	default:
		return false
	}
}

// gatewayFault reports whether a proxy answered for a server behind it.
func gatewayFault(resp *http.Response) bool {
	switch resp.StatusCode {
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	default:
		return false
	}
}

// onceError marks a call that must not be sent again: the server may have
// acted on it, and it carries no id that would make a repetition harmless.
type onceError struct{ err error }

func (e *onceError) Error() string { return e.err.Error() }
func (e *onceError) Unwrap() error { return e.err }

// repeatable reports whether the protocol makes a repetition of req harmless.
func repeatable(req *http.Request) bool {
	return !strings.HasSuffix(req.URL.Path, depotv1connect.AdminServiceCreateTokenProcedure)
}

// unsent reports whether err arose before a byte of the request was sent.
func unsent(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial"
}

// checkRetry repeats what met a broken connection or an unavailable server.
func checkRetry(ctx context.Context, resp *http.Response, err error) (bool, error) {
	var once *onceError
	switch {
	case ctx.Err() != nil:
		return false, context.Cause(ctx)
	case errors.As(err, &once):
		return false, nil
	case err != nil:
		return !lasting(err), nil
	case resp.StatusCode == http.StatusServiceUnavailable:
		return repeatable(resp.Request), nil
	default:
		return gatewayFault(resp) && !fromDepot(resp) && repeatable(resp.Request), nil
	}
}
