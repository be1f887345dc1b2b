package client_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/api/depot/v1/depotv1connect"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/internal/mtls"
)

// authority is a control plane's own CA.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, key}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// serverCertificate is a leaf for names, with the authority behind it.
func (a authority) serverCertificate(t *testing.T, names ...string) tls.Certificate {
	t.Helper()
	key := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), DNSNames: names,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der, a.cert.Raw}, PrivateKey: key}
}

// serve runs handler behind TLS and returns its URL.
func serve(t *testing.T, handler http.Handler, cert tls.Certificate) string {
	t.Helper()
	s := httptest.NewUnstartedServer(handler)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}
	s.EnableHTTP2 = true
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL
}

func token(t *testing.T, pin string) client.Token {
	t.Helper()
	tok, err := client.ParseToken("depot_user_" + strings.Repeat("0a", 16) + "_" + strings.Repeat("q", 52) + pin)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

// admin answers WhoAmI with what the caller sent, after failing a few times.
type admin struct {
	depotv1connect.UnimplementedAdminServiceHandler
	fail   error
	times  int32
	called atomic.Int32
}

func (a *admin) answer() error {
	if a.called.Add(1) <= a.times {
		return a.fail
	}
	return nil
}

func (a *admin) WhoAmI(ctx context.Context, _ *depotv1.WhoAmIRequest) (*depotv1.WhoAmIResponse, error) {
	if err := a.answer(); err != nil {
		return nil, err
	}
	info, _ := connect.CallInfoForHandlerContext(ctx)
	h := info.RequestHeader()
	return &depotv1.WhoAmIResponse{Name: strings.Join([]string{h.Get("Authorization"), h.Get("Depot-Api-Version"), h.Get("User-Agent")}, "|")}, nil
}

func (a *admin) CreateToken(context.Context, *depotv1.CreateTokenRequest) (*depotv1.CreateTokenResponse, error) {
	if err := a.answer(); err != nil {
		return nil, err
	}
	return &depotv1.CreateTokenResponse{}, nil
}

func mux(a *admin) http.Handler {
	m := http.NewServeMux()
	m.Handle(depotv1connect.NewAdminServiceHandler(a))
	return m
}

func newClient(t *testing.T, cfg client.Config) *client.Client {
	t.Helper()
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestCallsCarryWhoCalls(t *testing.T) {
	ca := newAuthority(t)
	url := serve(t, mux(&admin{}), ca.serverCertificate(t, client.PinnedName))
	tok := token(t, mtls.PinOf(ca.cert))
	got, err := newClient(t, client.Config{URL: url, Token: tok, UserAgent: "test/1"}).Admin.WhoAmI(t.Context(), &depotv1.WhoAmIRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if want := "Bearer " + tok.Secret() + "|1|test/1"; got.GetName() != want {
		t.Errorf("the server saw %q, want %q", got.GetName(), want)
	}
}

func TestServerIsVerified(t *testing.T) {
	ours, other := newAuthority(t), newAuthority(t)
	roots := x509.NewCertPool()
	roots.AddCert(ours.cert)
	// forged: a leaf of another authority that sends ours along.
	forged := other.serverCertificate(t, client.PinnedName)
	forged.Certificate[1] = ours.cert.Raw
	for name, tt := range map[string]struct {
		cert   tls.Certificate
		config client.Config
		want   string // in the error; empty: no error
	}{
		"pin":                       {cert: ours.serverCertificate(t, client.PinnedName), config: client.Config{Pin: mtls.PinOf(ours.cert)}},
		"roots":                     {cert: ours.serverCertificate(t, "localhost"), config: client.Config{Roots: roots}},
		"pin of another server":     {cert: ours.serverCertificate(t, client.PinnedName), config: client.Config{Pin: mtls.PinOf(other.cert)}, want: "does not carry the pinned certificate"},
		"authority only sent along": {cert: forged, config: client.Config{Pin: mtls.PinOf(ours.cert)}, want: "cannot be verified"},
		"pinned, for another role":  {cert: ours.serverCertificate(t, "machine"), config: client.Config{Pin: mtls.PinOf(ours.cert)}, want: "is not for that host"},
		"unknown authority":         {cert: ours.serverCertificate(t, "localhost"), config: client.Config{}, want: "DEPOT_CA_FILE"},
		"another host":              {cert: ours.serverCertificate(t, "elsewhere"), config: client.Config{Roots: roots}, want: "is not for that host"},
	} {
		t.Run(name, func(t *testing.T) {
			url := serve(t, mux(&admin{}), tt.cert)
			tt.config.URL = strings.Replace(url, "127.0.0.1", "localhost", 1)
			_, err := newClient(t, tt.config).Admin.WhoAmI(t.Context(), &depotv1.WhoAmIRequest{})
			expect(t, err, tt.want)
			if err != nil && client.Temporary(err) {
				t.Errorf("a wrong certificate counts as temporary: %v", err)
			}
		})
	}
}

func TestRepeats(t *testing.T) {
	unavailable := connect.NewError(connect.CodeUnavailable, errors.New("restarting"))
	whoAmI := func(ctx context.Context, c *client.Client) error {
		_, err := c.Admin.WhoAmI(ctx, &depotv1.WhoAmIRequest{})
		return err
	}
	createToken := func(ctx context.Context, c *client.Client) error {
		_, err := c.Admin.CreateToken(ctx, &depotv1.CreateTokenRequest{})
		return err
	}
	for name, tt := range map[string]struct {
		call  func(context.Context, *client.Client) error
		fail  error
		times int32
		calls int32
		want  string
	}{
		"unavailable passes":      {call: whoAmI, fail: unavailable, times: 2, calls: 3},
		"unavailable stays":       {call: whoAmI, fail: unavailable, times: 99, calls: 3, want: "restarting"},
		"a refusal is final":      {call: whoAmI, fail: connect.NewError(connect.CodePermissionDenied, errors.New("not yours")), times: 99, calls: 1, want: "not yours"},
		"a quota is final":        {call: whoAmI, fail: connect.NewError(connect.CodeResourceExhausted, errors.New("full")), times: 99, calls: 1, want: "full"},
		"an inner fault is final": {call: whoAmI, fail: connect.NewError(connect.CodeInternal, errors.New("quote x7")), times: 99, calls: 1, want: "quote x7"},
		"no id, no repetition":    {call: createToken, fail: unavailable, times: 99, calls: 1, want: "restarting"},
	} {
		t.Run(name, func(t *testing.T) {
			ca := newAuthority(t)
			a := &admin{fail: tt.fail, times: tt.times}
			url := serve(t, mux(a), ca.serverCertificate(t, client.PinnedName))
			c := newClient(t, client.Config{URL: url, Pin: mtls.PinOf(ca.cert), Tries: 3})
			expect(t, tt.call(t.Context(), c), tt.want)
			if got := a.called.Load(); got != tt.calls {
				t.Errorf("the server was called %d times, want %d", got, tt.calls)
			}
		})
	}
}

func TestSaysWhatIsWrong(t *testing.T) {
	page := func(status int) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			w.WriteHeader(status)
			_, _ = io.WriteString(w, "<html>")
		})
	}
	for name, tt := range map[string]struct {
		handler   http.Handler
		want      string
		temporary bool
	}{
		"web page":       {handler: page(http.StatusOK), want: "does not answer like a depot control plane"},
		"not found":      {handler: http.NotFoundHandler(), want: "404 Not Found"},
		"login redirect": {handler: http.RedirectHandler("https://login.invalid/", http.StatusUnauthorized), want: "401 Unauthorized"},
		"bad gateway":    {handler: page(http.StatusBadGateway), want: "502", temporary: true},
		"other API version": {
			handler: mux(&admin{times: 99, fail: connect.NewError(connect.CodeFailedPrecondition,
				errors.New("this server speaks version 2, the client 1: update the client"))}),
			want: "this server speaks version 2, the client 1: update the client",
		},
	} {
		t.Run(name, func(t *testing.T) {
			ca := newAuthority(t)
			url := serve(t, tt.handler, ca.serverCertificate(t, client.PinnedName))
			_, err := newClient(t, client.Config{URL: url, Pin: mtls.PinOf(ca.cert), Tries: 2}).Admin.WhoAmI(t.Context(), &depotv1.WhoAmIRequest{})
			expect(t, err, tt.want)
			if client.Temporary(err) != tt.temporary {
				t.Errorf("Temporary = %v, want %v, of %v", !tt.temporary, tt.temporary, err)
			}
		})
	}
	t.Run("nobody listens", func(t *testing.T) {
		_, err := newClient(t, client.Config{URL: "https://" + closedPort(t), Tries: 1}).Admin.WhoAmI(t.Context(), &depotv1.WhoAmIRequest{})
		expect(t, err, "Is the control plane running")
		if !client.Temporary(err) {
			t.Errorf("a server that is down counts as lasting: %v", err)
		}
	})
	t.Run("no TLS", func(t *testing.T) {
		s := httptest.NewServer(http.NotFoundHandler())
		t.Cleanup(s.Close)
		_, err := newClient(t, client.Config{URL: "https://" + s.Listener.Addr().String(), Tries: 1}).Admin.WhoAmI(t.Context(), &depotv1.WhoAmIRequest{})
		expect(t, err, "does not speak TLS")
	})
	t.Run("given up", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := newClient(t, client.Config{URL: "https://" + closedPort(t)}).Admin.WhoAmI(ctx, &depotv1.WhoAmIRequest{})
		expect(t, err, "was ended")
		if client.Temporary(err) || !errors.Is(err, context.Canceled) {
			t.Errorf("the caller's own end is not told: %v", err)
		}
	})
}

func closedPort(t *testing.T) string {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // a listener that nobody used
	return l.Addr().String()
}

func TestParseURL(t *testing.T) {
	for text, want := range map[string]string{
		"https://Depot.example.com/":      "https://depot.example.com",
		"depot.example.com:7080":          "https://depot.example.com:7080",
		"https://proxy.example.com/depot": "https://proxy.example.com/depot",
		"http://depot.example.com":        "",
		"https://":                        "",
		"https://user:pw@depot":           "",
		"https://depot/?x=1":              "",
		"":                                "",
		"https://%zz":                     "",
	} {
		u, err := client.ParseURL(text)
		switch {
		case want == "" && err == nil:
			t.Errorf("ParseURL(%q) = %s, want an error", text, u)
		case want != "" && err != nil:
			t.Errorf("ParseURL(%q): %v", text, err)
		case err != nil && strings.Contains(err.Error(), "pw"):
			t.Errorf("ParseURL(%q) repeats a password: %v", text, err)
		case want != "" && u.String() != want:
			t.Errorf("ParseURL(%q) = %s, want %s", text, u, want)
		}
	}
}

func TestToken(t *testing.T) {
	id, secret, pin := strings.Repeat("0a", 16), strings.Repeat("q", 52), strings.Repeat("7", 52)
	for name, tt := range map[string]struct {
		text, pin string
		bad       bool
	}{
		"without pin":    {text: "depot_user_" + id + "_" + secret},
		"with pin":       {text: "depot_project_" + id + "_" + secret + pin, pin: pin},
		"with newline":   {text: "depot_user_" + id + "_" + secret + "\n"},
		"empty":          {bad: true},
		"another vendor": {text: "ghp_0123456789", bad: true},
		"cut off":        {text: "depot_user_" + id + "_" + secret[:51], bad: true},
		"upper case":     {text: "depot_user_" + id + "_" + strings.ToUpper(secret), bad: true},
		"bad id":         {text: "depot_user_" + id[:31] + "z_" + secret, bad: true},
	} {
		t.Run(name, func(t *testing.T) {
			tok, err := client.ParseToken(tt.text)
			if tt.bad {
				if err == nil {
					t.Fatal("no error")
				}
				if tt.text != "" && strings.Contains(err.Error(), tt.text) {
					t.Errorf("the error repeats the token: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if tok.Pin() != tt.pin || tok.ID() != id {
				t.Errorf("pin %q, id %q", tok.Pin(), tok.ID())
			}
			var log strings.Builder
			slog.New(slog.NewTextHandler(&log, nil)).Info("call", "token", tok)
			for _, text := range []string{fmt.Sprintf("%v %+v %#v %s", tok, tok, tok, tok), log.String()} {
				if strings.Contains(text, secret) {
					t.Errorf("the secret shows in %s", text)
				}
			}
		})
	}
}

func expect(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Fatalf("unexpected error: %v", err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Fatalf("error %q, want one with %q", err, want)
	}
}
