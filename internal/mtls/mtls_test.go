package mtls_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/opendepot/depot/internal/mtls"
)

const serverName = "machine.depot.internal"

// authority is a small CA for tests.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: t.Name()},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	a := authority{t: t, key: key}
	a.cert = a.sign(template, key.Public(), template)
	return a
}

func (a authority) sign(template *x509.Certificate, public any, parent *x509.Certificate) *x509.Certificate {
	a.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return c
}

// issue answers a real request, with the changes that the case makes.
func (a authority) issue(change func(*x509.Certificate), withRoot bool) *mtls.Identity {
	a.t.Helper()
	key, err := mtls.NewKey()
	if err != nil {
		a.t.Fatal(err)
	}
	csr, err := key.CSR()
	if err != nil {
		a.t.Fatal(err)
	}
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		a.t.Fatal(err)
	}
	if err := req.CheckSignature(); err != nil {
		a.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2),
		NotBefore:    time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Minute),
		KeyUsage: x509.KeyUsageDigitalSignature,
	}
	change(template)
	chain := [][]byte{a.sign(template, req.PublicKey, a.cert).Raw}
	if withRoot {
		chain = append(chain, a.cert.Raw)
	}
	id, err := mtls.NewIdentity(key, chain)
	if err != nil {
		a.t.Fatal(err)
	}
	return id
}

func (a authority) anchors() *mtls.Anchors {
	a.t.Helper()
	anchors, err := mtls.NewAnchors([][]byte{a.cert.Raw})
	if err != nil {
		a.t.Fatal(err)
	}
	return anchors
}

func forServer(c *x509.Certificate) {
	c.ExtKeyUsage, c.DNSNames = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, []string{serverName}
}

func forClient(c *x509.Certificate) {
	c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
}

// handshake connects the two over TCP, moves a byte each way, and returns what
// each side saw.
func handshake(t *testing.T, client, server *tls.Config) (clientErr, serverErr error) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // loopback, at once
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close() //nolint:errcheck // a test's listener
	result := make(chan error, 1)
	go func() {
		raw, err := listener.Accept()
		if err != nil {
			result <- err
			return
		}
		conn := tls.Server(raw, server)
		defer conn.Close() //nolint:errcheck // the peer has what it needs
		if err := conn.HandshakeContext(t.Context()); err != nil {
			result <- err
			return
		}
		_, err = conn.Write([]byte{1})
		result <- err
	}()
	raw, err := net.Dial("tcp", listener.Addr().String()) //nolint:noctx // loopback, at once
	if err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, client)
	defer conn.Close() //nolint:errcheck // a test's connection
	if clientErr = conn.HandshakeContext(t.Context()); clientErr == nil {
		_, clientErr = conn.Read(make([]byte, 1))
	} else {
		_ = raw.Close()
	}
	return clientErr, <-result
}

func TestHandshake(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	expired := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }
	both := func(changes ...func(*x509.Certificate)) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			for _, change := range changes {
				change(c)
			}
		}
	}
	anyUsage := func(c *x509.Certificate) { c.ExtKeyUsage = nil }
	twoUsages := func(c *x509.Certificate) {
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	for name, test := range map[string]struct {
		client        func(*mtls.Client)
		server        func(*mtls.Server)
		clientTLS     func(*tls.Config)
		wantClientErr string // what the client saw; "alert" for any refusal by the server
		wantServerErr bool
	}{
		"good":               {},
		"server of another":  {server: func(s *mtls.Server) { s.Identity = other.issue(forServer, false) }, wantClientErr: "unknown authority", wantServerErr: true},
		"server, other name": {client: func(c *mtls.Client) { c.ServerName = "other.depot.internal" }, wantClientErr: "not other.depot.internal", wantServerErr: true},
		"server expired":     {server: func(s *mtls.Server) { s.Identity = a.issue(both(forServer, expired), false) }, wantClientErr: "expired", wantServerErr: true},
		"client certificate used as a server's": {
			server:        func(s *mtls.Server) { s.Identity = a.issue(both(forServer, forClient), false) },
			wantClientErr: "not for this role", wantServerErr: true,
		},
		"server without usages":                 {server: func(s *mtls.Server) { s.Identity = a.issue(both(forServer, anyUsage), false) }, wantClientErr: "not for this role", wantServerErr: true},
		"server without certificate":            {server: func(s *mtls.Server) { s.Identity = &mtls.Identity{} }, wantClientErr: "alert", wantServerErr: true},
		"client of another":                     {client: func(c *mtls.Client) { c.Identity = other.issue(forClient, false) }, wantClientErr: "alert", wantServerErr: true},
		"client expired":                        {client: func(c *mtls.Client) { c.Identity = a.issue(both(forClient, expired), false) }, wantClientErr: "alert", wantServerErr: true},
		"client without certificate":            {client: func(c *mtls.Client) { c.Identity = nil }, wantClientErr: "alert", wantServerErr: true},
		"client without certificate, allowed":   {client: func(c *mtls.Client) { c.Identity = nil }, server: func(s *mtls.Server) { s.Optional = true }},
		"client of another where optional":      {client: func(c *mtls.Client) { c.Identity = other.issue(forClient, false) }, server: func(s *mtls.Server) { s.Optional = true }, wantClientErr: "alert", wantServerErr: true},
		"server certificate used as a client's": {client: func(c *mtls.Client) { c.Identity = a.issue(forServer, false) }, wantClientErr: "alert", wantServerErr: true},
		"client with two usages":                {client: func(c *mtls.Client) { c.Identity = a.issue(both(forClient, twoUsages), false) }, wantClientErr: "alert", wantServerErr: true},
		"client without usages":                 {client: func(c *mtls.Client) { c.Identity = a.issue(both(forClient, anyUsage), false) }, wantClientErr: "alert", wantServerErr: true},
		"client not admitted":                   {server: func(s *mtls.Server) { s.Admit = func(*x509.Certificate) error { return errors.New("no") } }, wantClientErr: "alert", wantServerErr: true},
		"TLS 1.2":                               {clientTLS: func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }, wantClientErr: "protocol version", wantServerErr: true},
		"client's clock is wrong": {
			client:        func(c *mtls.Client) { c.Time = func() time.Time { return time.Now().Add(-24 * time.Hour) } },
			wantClientErr: "not yet valid", wantServerErr: true,
		},
		"nothing trusted":     {client: func(c *mtls.Client) { c.Anchors = nil }, wantClientErr: "set one of", wantServerErr: true},
		"two kinds of trust":  {client: func(c *mtls.Client) { c.SystemRoots = true }, wantClientErr: "set one of", wantServerErr: true},
		"the system's roots":  {client: func(c *mtls.Client) { c.Anchors, c.SystemRoots = nil, true }, wantClientErr: "certificate", wantServerErr: true},
		"no name to expect":   {client: func(c *mtls.Client) { c.ServerName = "" }, wantClientErr: "no name", wantServerErr: true},
		"an empty anchor set": {client: func(c *mtls.Client) { c.Anchors = &mtls.Anchors{} }, wantClientErr: "unknown authority", wantServerErr: true},
	} {
		t.Run(name, func(t *testing.T) {
			client := mtls.Client{Identity: a.issue(forClient, false), Anchors: a.anchors(), ServerName: serverName, NextProtos: []string{"h2"}}
			server := mtls.Server{Identity: a.issue(forServer, false), Anchors: a.anchors(), NextProtos: []string{"h2"}}
			if test.client != nil {
				test.client(&client)
			}
			if test.server != nil {
				test.server(&server)
			}
			config := client.Config()
			if test.clientTLS != nil {
				test.clientTLS(config)
			}
			clientErr, serverErr := handshake(t, config, server.Config())
			if (serverErr != nil) != test.wantServerErr {
				t.Errorf("server: error %v, want one: %t", serverErr, test.wantServerErr)
			}
			var alert tls.AlertError
			switch want := test.wantClientErr; {
			case want == "" && clientErr != nil:
				t.Errorf("client: %v", clientErr)
			case want == "alert" && (clientErr == nil || !errors.As(clientErr, &alert) && !strings.Contains(clientErr.Error(), "remote error")):
				t.Errorf("client: %v, want an alert", clientErr)
			case want != "" && want != "alert" && (clientErr == nil || !strings.Contains(clientErr.Error(), want)):
				t.Errorf("client: %v, want %q", clientErr, want)
			}
		})
	}
}

func TestPin(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	leaf := a.issue(forServer, true)
	for name, test := range map[string]struct {
		pin     string
		server  *mtls.Identity
		name    string
		wantPin bool // a PinError
		wantErr bool
	}{
		"authority in the chain":       {pin: mtls.PinOf(a.cert), server: leaf, name: serverName},
		"the leaf itself":              {pin: mtls.PinOf(leaf.Leaf()), server: leaf, name: serverName},
		"another server":               {pin: mtls.PinOf(other.cert), server: leaf, name: serverName, wantErr: true, wantPin: true},
		"authority is not shown":       {pin: mtls.PinOf(a.cert), server: a.issue(forServer, false), name: serverName, wantErr: true, wantPin: true},
		"another name":                 {pin: mtls.PinOf(a.cert), server: leaf, name: "x.depot.internal", wantErr: true},
		"a client's, pinned itself":    {pin: mtls.PinOf(a.cert), server: a.issue(forClient, true), name: serverName, wantErr: true},
		"pinned, but signs not this":   {pin: mtls.PinOf(other.cert), server: borrowed(t, a, other), name: serverName, wantErr: true},
		"a leaf's pin on another leaf": {pin: mtls.PinOf(leaf.Leaf()), server: a.issue(forServer, true), name: serverName, wantErr: true, wantPin: true},
	} {
		t.Run(name, func(t *testing.T) {
			if !mtls.ValidPin(test.pin) {
				t.Errorf("pin %q is not valid", test.pin)
			}
			client := mtls.Client{Pin: test.pin, ServerName: test.name, Address: "192.0.2.1:443"}
			err, _ := handshake(t, client.Config(), mtls.Server{Identity: test.server}.Config())
			var pinErr *mtls.PinError
			if (err != nil) != test.wantErr || errors.As(err, &pinErr) != test.wantPin {
				t.Fatalf("got %v, want an error: %t, of the pin: %t", err, test.wantErr, test.wantPin)
			}
			if test.wantPin && !strings.Contains(err.Error(), "the server at 192.0.2.1:443 does not carry the pinned certificate") {
				t.Errorf("the message does not name the server: %v", err)
			}
		})
	}
	for _, bad := range []string{"", "abc", strings.Repeat("A", 52), strings.Repeat("1", 52)} {
		if mtls.ValidPin(bad) {
			t.Errorf("%q is valid", bad)
		}
	}
}

// borrowed is a's leaf with other's certificate added to the chain: a stranger
// who copied the public certificate of the pinned authority.
func borrowed(t *testing.T, a, other authority) *mtls.Identity {
	t.Helper()
	key, err := mtls.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(3), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Minute)}
	forServer(template)
	id, err := mtls.NewIdentity(key, [][]byte{a.sign(template, key.Public(), a.cert).Raw, other.cert.Raw})
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestRotation(t *testing.T) {
	a, next := newAuthority(t), newAuthority(t)
	server := mtls.Server{Identity: a.issue(forServer, false), Anchors: a.anchors()}
	client := mtls.Client{Identity: a.issue(forClient, false), Anchors: a.anchors(), ServerName: serverName}
	serverTLS, clientTLS := server.Config(), client.Config()
	both := [][]byte{a.cert.Raw, next.cert.Raw}
	check := func(step string, want bool) {
		t.Helper()
		clientErr, serverErr := handshake(t, clientTLS, serverTLS)
		if good := clientErr == nil && serverErr == nil; good != want {
			t.Fatalf("%s: client %v, server %v, want success: %t", step, clientErr, serverErr, want)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	install := func(id *mtls.Identity, change func(*x509.Certificate)) {
		t.Helper()
		key, err := mtls.NewKey()
		must(err)
		template := &x509.Certificate{SerialNumber: big.NewInt(4), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Minute)}
		change(template)
		must(id.Install(key, [][]byte{next.sign(template, key.Public(), next.cert).Raw}))
	}
	check("before", true)
	must(server.Anchors.Replace(both))
	must(client.Anchors.Replace(both))
	check("both trusted", true)
	install(server.Identity, forServer)
	check("new server certificate", true)
	install(client.Identity, forClient)
	check("new client certificate", true)
	must(server.Anchors.Replace([][]byte{a.cert.Raw}))
	check("old anchor only", false)
	must(server.Anchors.Replace([][]byte{next.cert.Raw}))
	must(client.Anchors.Replace([][]byte{next.cert.Raw}))
	check("new anchor only", true)

	for name, ders := range map[string][][]byte{"empty": nil, "no certificate": {{1}}, "a leaf": {client.Identity.Leaf().Raw}} {
		if err := server.Anchors.Replace(ders); err == nil {
			t.Errorf("anchors %s: accepted", name)
		}
	}
	check("after refused replacements", true)
	key, err := mtls.NewKey()
	must(err)
	if err := client.Identity.Install(key, client.Identity.Chain()); err == nil {
		t.Error("a certificate for another key was installed")
	}
	if err := client.Identity.Install(key, nil); err == nil {
		t.Error("an empty chain was installed")
	}
}

func TestCSRHoldsTheKeyOnly(t *testing.T) {
	key, err := mtls.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	der, err := key.CSR()
	if err != nil {
		t.Fatal(err)
	}
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	if len(req.Extensions)+len(req.Subject.Names)+len(req.DNSNames)+len(req.URIs) > 0 {
		t.Errorf("the request asks for names or extensions: %+v", req)
	}
}

func TestParseLeafName(t *testing.T) {
	digits := strings.Repeat("0a", 16)
	want := mtls.LeafName{Server: "srv_" + digits, Lease: "lse_" + digits, Machine: "mch_" + digits}
	lease, machine := "depot://"+want.Server+"/lease/"+want.Lease, "depot://"+want.Server+"/machine/"+want.Machine
	for name, test := range map[string]struct {
		uris   []string
		change func(*x509.Certificate)
		wantOK bool
	}{
		"good":                {uris: []string{lease, machine}, wantOK: true},
		"one only":            {uris: []string{lease}},
		"three":               {uris: []string{lease, machine, machine}},
		"two machines":        {uris: []string{machine, machine}},
		"two leases":          {uris: []string{lease, lease}},
		"another order":       {uris: []string{machine, lease}},
		"another server":      {uris: []string{lease, "depot://srv_" + strings.Repeat("1", 32) + "/machine/" + want.Machine}},
		"another scheme":      {uris: []string{strings.Replace(lease, "depot", "https", 1), machine}},
		"a query":             {uris: []string{lease + "?x", machine}},
		"a user":              {uris: []string{strings.Replace(lease, "//", "//me@", 1), machine}},
		"a longer path":       {uris: []string{lease + "/x", machine}},
		"an id in upper case": {uris: []string{strings.ToUpper(lease), machine}},
		"no id":               {uris: []string{"depot://" + want.Server + "/lease/x", machine}},
		"a DNS name beside":   {uris: []string{lease, machine}, change: func(c *x509.Certificate) { c.DNSNames = []string{"x"} }},
		"an address beside":   {uris: []string{lease, machine}, change: func(c *x509.Certificate) { c.IPAddresses = []net.IP{{127, 0, 0, 1}} }},
	} {
		t.Run(name, func(t *testing.T) {
			leaf := &x509.Certificate{}
			for _, s := range test.uris {
				u, err := url.Parse(s)
				if err != nil {
					t.Fatal(err)
				}
				leaf.URIs = append(leaf.URIs, u)
			}
			if test.change != nil {
				test.change(leaf)
			}
			got, err := mtls.ParseLeafName(leaf)
			if (err == nil) != test.wantOK {
				t.Fatalf("got %+v, %v", got, err)
			}
			if test.wantOK {
				if diff := cmp.Diff(want, got); diff != "" {
					t.Error(diff)
				}
			}
		})
	}
	a := newAuthority(t)
	leaf := a.issue(func(c *x509.Certificate) { forClient(c); c.URIs = want.URIs() }, false).Leaf()
	if got, err := mtls.ParseLeafName(leaf); err != nil || got != want {
		t.Errorf("round trip: %+v, %v", got, err)
	}
}
