package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"

	"connectrpc.com/connect"
	"github.com/opendepot/depot/internal/mtls"
)

// Error is a failed call, in words for people. The [connect.Error] stays in
// its chain: connect.CodeOf tells what the server refused.
type Error struct {
	// Message says what happened, to what, and what to do next.
	Message string
	// Err is the cause.
	Err error
}

// Error returns the message.
func (e *Error) Error() string { return e.Message }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// notDepotError reports an answer that no control plane gives.
type notDepotError struct {
	status      int
	contentType string
}

func (e *notDepotError) Error() string {
	text := fmt.Sprintf("%d %s", e.status, http.StatusText(e.status))
	if e.contentType != "" {
		text += " (" + e.contentType + ")"
	}
	return text
}

// Temporary reports whether the same call may succeed later without anyone
// mending anything: the server is not reachable, restarts, or was slow. A
// refusal, a wrong certificate and the end of the caller's own context are not
// temporary.
func Temporary(err error) bool {
	if err == nil || lasting(err) {
		return false
	}
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded:
		return true
	default:
		return false
	}
}

// lasting reports whether err came from below HTTP and repeating cannot help.
func lasting(err error) bool {
	var (
		notDepot *notDepotError
		cert     *tls.CertificateVerificationError
		record   tls.RecordHeaderError
		alert    tls.AlertError
		dns      *net.DNSError
	)
	switch {
	case errors.As(err, &notDepot), errors.As(err, &cert),
		errors.As(err, &record), errors.As(err, &alert), errors.Is(err, http.ErrSchemeMismatch):
		return true
	case errors.As(err, &dns):
		return dns.IsNotFound
	default:
		return false
	}
}

// explain turns what a call met into an [Error].
func explain(parent context.Context, err error, server string) error {
	if err == nil {
		return nil
	}
	var (
		pin      *mtls.PinError
		notDepot *notDepotError
		record   tls.RecordHeaderError
		alert    tls.AlertError
		cert     *tls.CertificateVerificationError
		host     x509.HostnameError
		dns      *net.DNSError
		op       *net.OpError
		rpc      *connect.Error
	)
	say := func(format string, args ...any) error {
		return &Error{Message: fmt.Sprintf(format, args...), Err: err}
	}
	switch {
	case parent.Err() != nil:
		return say("the call to %s was ended: %v", server, context.Cause(parent))
	case errors.As(err, &pin):
		return say("%v", pin)
	case errors.As(err, &notDepot):
		return say("%s does not answer like a depot control plane of this version: %v. "+
			"Check the URL's host, port and path", server, notDepot)
	case errors.As(err, &record), errors.Is(err, http.ErrSchemeMismatch):
		return say("%s does not speak TLS: check the URL's port", server)
	case errors.As(err, &host):
		return say("the certificate of %s is not for that host: %v. Use the name that it was made for, or a token with the server's pin", server, host)
	case errors.As(err, &cert):
		return say("the certificate of %s cannot be verified: %v. "+
			"Use a token with the server's pin, or name the authority's file in DEPOT_CA_FILE", server, cert.Err)
	case errors.As(err, &alert):
		return say("%s refused the TLS connection: %v. The certificate shown may be revoked, expired or another server's", server, alert)
	case errors.As(err, &dns):
		return say("%s cannot be reached: the name %q does not resolve (%v). Check the URL and the network", server, dns.Name, dns.Err)
	case errors.As(err, &op), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return say("%s cannot be reached: %v. Is the control plane running, and can this host connect to it?", server, cause(err))
	case errors.Is(err, context.DeadlineExceeded):
		return say("%s did not answer in time. Is the control plane overloaded, or the network cut?", server)
	case errors.As(err, &rpc) && rpc.Message() != "":
		return say("%s", rpc.Message())
	default:
		return say("%s: %v", server, err)
	}
}

// cause strips the layers that only repeat "unavailable" and the URL.
func cause(err error) error {
	var rpc *connect.Error
	if errors.As(err, &rpc) && rpc.Unwrap() != nil {
		return rpc.Unwrap()
	}
	return err
}
