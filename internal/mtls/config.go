package mtls

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// Client describes the connecting side. Exactly one of Anchors, Pin and
// SystemRoots says which servers it trusts; with none, every handshake fails.
type Client struct {
	// Identity is shown to servers that ask for a certificate; nil for none.
	Identity *Identity
	// Anchors trusts leaves of these authorities that are for servers only.
	Anchors *Anchors
	// Pin trusts the server whose chain carries this certificate: see [PinOf].
	Pin string
	// SystemRoots trusts what the host trusts.
	SystemRoots bool
	// ServerName is the DNS name that the server's leaf must carry, and that is
	// sent to it.
	ServerName string
	// Address names the server in errors; empty means ServerName.
	Address string
	// NextProtos are the protocols to offer (ALPN), best first.
	NextProtos []string
	// Time is used instead of the wall clock, which may be wrong on a client's
	// host; nil means time.Now.
	Time func() time.Time
}

// Config returns a configuration that may be used for any number of
// connections at once.
func (c Client) Config() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		ServerName: c.ServerName,
		NextProtos: c.NextProtos,
		Time:       c.Time,
		// crypto/tls would verify against a pool that is fixed when the
		// configuration is made; verify does all that it does, and more.
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection verifies
		VerifyConnection:   c.verify,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if c.Identity != nil {
				if cert := c.Identity.current.Load(); cert != nil {
					return cert, nil
				}
			}
			return &tls.Certificate{}, nil
		},
	}
}

func (c Client) verify(state tls.ConnectionState) error {
	chain := state.PeerCertificates
	if len(chain) == 0 || c.ServerName == "" {
		return fmt.Errorf("verify %s: no certificate, or no name to expect in it", c.server())
	}
	opts := x509.VerifyOptions{
		DNSName:       c.ServerName,
		CurrentTime:   now(c.Time),
		Intermediates: x509.NewCertPool(),
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, cert := range chain[1:] {
		opts.Intermediates.AddCert(cert)
	}
	switch {
	case c.Anchors != nil && c.Pin == "" && !c.SystemRoots:
		opts.Roots = c.Anchors.load()
		if err := only(chain[0], x509.ExtKeyUsageServerAuth); err != nil {
			return fmt.Errorf("verify %s: %w", c.server(), err)
		}
	case c.Anchors == nil && c.Pin != "" && !c.SystemRoots:
		root := pinned(chain, c.Pin)
		if root == nil {
			return &PinError{Address: c.server(), Pin: c.Pin, Got: PinOf(chain[len(chain)-1])}
		}
		opts.Roots = x509.NewCertPool()
		opts.Roots.AddCert(root)
	case c.Anchors == nil && c.Pin == "" && c.SystemRoots: // no Roots means the system's
	default:
		return fmt.Errorf("verify %s: set one of anchors, pin and system roots", c.server())
	}
	if _, err := chain[0].Verify(opts); err != nil {
		return fmt.Errorf("verify %s: %w", c.server(), err)
	}
	return nil
}

func (c Client) server() string {
	if c.Address != "" {
		return c.Address
	}
	return c.ServerName
}

// Server describes the accepting side.
type Server struct {
	// Identity is shown to clients.
	Identity *Identity
	// Anchors are the authorities of client certificates, which must be for
	// clients only. Nil asks for no certificate.
	Anchors *Anchors
	// Optional lets in clients that show no certificate; a bad one is refused.
	Optional bool
	// Admit, if set, decides about a client whose certificate is good; an error
	// ends the handshake with an alert. It is not called without a certificate.
	Admit func(leaf *x509.Certificate) error
	// NextProtos are the protocols to agree on (ALPN).
	NextProtos []string
	// Time is used instead of the wall clock; nil means time.Now.
	Time func() time.Time
}

// Config returns a configuration that may be used for any number of
// connections at once.
func (s Server) Config() *tls.Config {
	base := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             s.NextProtos,
		Time:                   s.Time,
		SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if cert := s.Identity.current.Load(); cert != nil {
				return cert, nil
			}
			return nil, errors.New("no certificate has been issued yet")
		},
	}
	if s.Anchors == nil {
		return base
	}
	base.ClientAuth = tls.RequireAndVerifyClientCert
	if s.Optional {
		base.ClientAuth = tls.VerifyClientCertIfGiven
	}
	base.VerifyConnection = s.verify
	base.ClientCAs = s.Anchors.load()
	outer := base.Clone()
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		c := base.Clone()
		c.ClientCAs = s.Anchors.load()
		return c, nil
	}
	return outer
}

// verify adds to crypto/tls's verification, which has come to its end.
func (s Server) verify(state tls.ConnectionState) error {
	if len(state.VerifiedChains) == 0 {
		if s.Optional && len(state.PeerCertificates) == 0 {
			return nil
		}
		return errors.New("the client's certificate was not verified")
	}
	leaf := state.PeerCertificates[0]
	if err := only(leaf, x509.ExtKeyUsageClientAuth); err != nil {
		return err
	}
	if s.Admit == nil {
		return nil
	}
	return s.Admit(leaf)
}

// only reports a leaf that is good for anything but usage. crypto/x509 takes a
// certificate without usages for one that is good for all.
func only(leaf *x509.Certificate, usage x509.ExtKeyUsage) error {
	if leaf.IsCA || len(leaf.UnknownExtKeyUsage) > 0 || !slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{usage}) {
		return errors.New("the certificate is not for this role alone: a client's is for client authentication only, a server's for server authentication only")
	}
	return nil
}

func now(clock func() time.Time) time.Time {
	if clock == nil {
		return time.Now()
	}
	return clock()
}
