package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/hashicorp/go-retryablehttp"
	"github.com/opendepot/depot/controlplane/api/depot/v1/depotv1connect"
	"github.com/opendepot/depot/internal/mtls"
)

// APIVersion is the major version of the protocol that this client speaks.
const APIVersion = "1"

// PinnedName is the name that every control plane's own certificate carries,
// and that a client with a pin expects, whatever the URL's host.
const PinnedName = "depot-controlplane"

// Times of one attempt. A hanging call is answered after 25 s at most, so that
// a call without an answer after callTimeout has met a dead server or network.
const (
	callTimeout  = 40 * time.Second
	dialTimeout  = 10 * time.Second
	pingAfter    = 15 * time.Second
	pingTimeout  = 10 * time.Second
	retryWaitMin = 100 * time.Millisecond
	retryWaitMax = 2 * time.Second
	defaultTries = 5
)

// Config says which server to call and as whom. Only URL is mandatory.
type Config struct {
	// URL is the server's: https://host[:port][/path].
	URL string
	// Token is sent with every call. The zero Token sends none.
	Token Token
	// Pin is the server's pin; empty means the token's, if it has one.
	Pin string
	// Roots are the authorities to trust where there is no pin; nil means the
	// system's.
	Roots *x509.CertPool
	// Identity is the caller's certificate, for machines and agents; nil means
	// none. It is asked at each connection, so that a renewed one is used.
	Identity *mtls.Identity
	// UserAgent names the program and its version, for the server's log.
	UserAgent string
	// Dial connects to the server; nil means TCP. A machine hands in one that
	// dials its relay's unix socket.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Tries is how often a call is sent at most, 0 meaning 5: about 1.5 s pass
	// before the last. A caller with a loop of its own sets 1.
	Tries int
}

// Client holds the protocol's clients for one server. It is safe for
// concurrent use.
type Client struct {
	Builder depotv1connect.BuilderServiceClient
	Admin   depotv1connect.AdminServiceClient
	Agent   depotv1connect.AgentServiceClient
	Machine depotv1connect.MachineServiceClient

	server    *url.URL
	transport *http.Transport
}

// New returns a client. It does not connect; its errors are about the
// configuration.
func New(cfg Config) (*Client, error) {
	server, err := ParseURL(cfg.URL)
	if err != nil {
		return nil, err
	}
	if cfg.Pin == "" {
		cfg.Pin = cfg.Token.Pin()
	}
	if cfg.Pin != "" && !mtls.ValidPin(cfg.Pin) {
		return nil, fmt.Errorf("pin %q is not valid: a pin is %d characters of a-z and 2-7", cfg.Pin, pinLen)
	}
	if cfg.Tries == 0 {
		cfg.Tries = defaultTries
	}
	transport := newTransport(cfg, server)
	retry := &retryablehttp.Client{
		HTTPClient:   &http.Client{Transport: strict{transport}},
		RetryWaitMin: retryWaitMin,
		RetryWaitMax: retryWaitMax,
		RetryMax:     cfg.Tries - 1,
		CheckRetry:   checkRetry,
		Backoff:      retryablehttp.DefaultBackoff,
		ErrorHandler: retryablehttp.PassthroughErrorHandler,
	}
	base := strings.TrimSuffix(server.String(), "/")
	calls := retry.StandardClient()
	opts := connect.WithInterceptors(caller{token: cfg.Token, userAgent: cfg.UserAgent, server: base}.interceptor())
	return &Client{
		Builder:   depotv1connect.NewBuilderServiceClient(calls, base, opts),
		Admin:     depotv1connect.NewAdminServiceClient(calls, base, opts),
		Agent:     depotv1connect.NewAgentServiceClient(calls, base, opts),
		Machine:   depotv1connect.NewMachineServiceClient(calls, base, opts),
		server:    server,
		transport: transport,
	}, nil
}

// URL is the server's, for messages and as a key.
func (c *Client) URL() string { return c.server.String() }

// Close closes the connections that no call uses.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// ParseURL checks a server's URL and brings it into one form: a missing scheme
// is https, and there is no trailing slash.
func ParseURL(text string) (*url.URL, error) {
	if !strings.Contains(text, "://") {
		text = "https://" + text
	}
	u, err := url.Parse(text)
	switch {
	case err != nil:
		return nil, fmt.Errorf("server URL is not valid: %w", err)
	case u.Scheme != "https":
		return nil, fmt.Errorf("server URL %q is not valid: a control plane speaks TLS only, use https://%s", u.Redacted(), u.Host)
	case u.Hostname() == "":
		return nil, fmt.Errorf("server URL %q has no host: use https://host[:port]", u.Redacted())
	case u.User != nil, u.RawQuery != "", u.Fragment != "":
		return nil, fmt.Errorf("server URL %q is not valid: use https://host[:port][/path] and nothing else", u.Redacted())
	}
	u.Host = strings.ToLower(u.Host)
	u.Path = strings.TrimRight(u.Path, "/")
	return u, nil
}

func newTransport(cfg Config, server *url.URL) *http.Transport {
	dial := cfg.Dial
	if dial == nil {
		dial = (&net.Dialer{Timeout: dialTimeout}).DialContext
	}
	t := &http.Transport{
		DialContext:         dial,
		TLSClientConfig:     newTLSConfig(cfg, server),
		TLSHandshakeTimeout: dialTimeout,
		ForceAttemptHTTP2:   true,
		IdleConnTimeout:     90 * time.Second,
		HTTP2:               &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout},
	}
	if cfg.Dial == nil {
		t.Proxy = http.ProxyFromEnvironment
	}
	return t
}

func newTLSConfig(cfg Config, server *url.URL) *tls.Config {
	c := mtls.Client{
		Identity:   cfg.Identity,
		Pin:        cfg.Pin,
		ServerName: PinnedName,
		Address:    server.Host,
	}.Config()
	if cfg.Pin != "" {
		verify := c.VerifyConnection
		c.VerifyConnection = func(s tls.ConnectionState) error {
			if err := verify(s); err != nil {
				return &tls.CertificateVerificationError{UnverifiedCertificates: s.PeerCertificates, Err: err}
			}
			return nil
		}
		return c
	}
	c.ServerName, c.RootCAs = server.Hostname(), cfg.Roots
	c.InsecureSkipVerify, c.VerifyConnection = false, nil // crypto/tls verifies
	return c
}

// caller adds to each call who calls, and words to each error.
type caller struct {
	token     Token
	userAgent string
	server    string
}

func (c caller) interceptor() connect.UnaryInterceptorFunc {
	return func(next connect.UnaryFunc) connect.UnaryFunc {
		return func(parent context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			req.Header().Set("Depot-Api-Version", APIVersion)
			if c.userAgent != "" {
				req.Header().Set("User-Agent", c.userAgent)
			}
			if !c.token.IsZero() {
				req.Header().Set("Authorization", "Bearer "+c.token.Secret())
			}
			ctx, cancel := context.WithTimeout(parent, callTimeout)
			defer cancel()
			resp, err := next(ctx, req)
			return resp, explain(parent, err, c.server)
		}
	}
}
