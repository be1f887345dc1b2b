package ca_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opendepot/depot/controlplane"
	"github.com/opendepot/depot/controlplane/ca"
)

func newAuthority(tb testing.TB) *ca.Authority {
	tb.Helper()
	a, err := ca.New(masterKey(1))
	if err != nil {
		tb.Fatal(err)
	}
	return a
}

func masterKey(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }

func sealed(t *testing.T, a *ca.Authority, owner string) controlplane.SealedAuthority {
	t.Helper()
	s, err := a.NewAuthority(owner, "depot project "+owner)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func ecdsaKey(tb testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func rsaKey(t *testing.T, bits int) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func request(tb testing.TB, key crypto.Signer, template x509.CertificateRequest) []byte {
	tb.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		tb.Fatal(err)
	}
	return csr
}

// clientLeaf and serverLeaf are what the server asks for.
func clientLeaf(csr []byte) controlplane.Leaf {
	now := time.Now()
	return controlplane.Leaf{
		CSR: csr, Usage: controlplane.UsageClient, URIs: []string{"depot://srv_1/lease/lse_1", "depot://srv_1/machine/mch_1"},
		NotBefore: now.Add(-5 * time.Minute), NotAfter: now.Add(time.Hour),
	}
}

func serverLeaf(csr []byte) controlplane.Leaf {
	l := clientLeaf(csr)
	l.Usage, l.URIs, l.DNSNames, l.IPs = controlplane.UsageServer, nil, []string{"m-1.machine.depot"}, []string{"192.0.2.7", "2001:db8::7"}
	return l
}

func parse(t *testing.T, der []byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestAuthorityCertificate(t *testing.T) {
	t.Parallel()
	s := sealed(t, newAuthority(t), "prj_1")
	c := parse(t, s.Certificate)
	if !c.IsCA || !c.BasicConstraintsValid || c.MaxPathLen != 0 || !c.MaxPathLenZero || c.KeyUsage != x509.KeyUsageCertSign || len(c.ExtKeyUsage) > 0 {
		t.Errorf("it can sign other than leaves: CA %t, path length %d, key usage %b", c.IsCA, c.MaxPathLen, c.KeyUsage)
	}
	if left := time.Until(c.NotAfter); left < 9*365*24*time.Hour || left > 11*365*24*time.Hour {
		t.Errorf("it is valid for %s, want ten years", left)
	}
	if bytes.Contains(s.SealedKey, c.RawSubjectPublicKeyInfo) || len(s.SealedKey) == 0 {
		t.Error("the key is not sealed")
	}
}

func TestSign(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := sealed(t, a, "prj_1")
	roots := x509.NewCertPool()
	roots.AddCert(parse(t, s.Certificate))
	// Whatever a CSR asks for besides its key is not its to ask (own-lease).
	greedy := x509.CertificateRequest{
		Subject:        pkix.Name{CommonName: "root"},
		DNSNames:       []string{"m-2.machine.depot"},
		IPAddresses:    []net.IP{net.IPv4(192, 0, 2, 9)},
		EmailAddresses: []string{"root@example.com"},
		URIs:           []*url.URL{{Scheme: "depot", Host: "srv_1", Path: "/lease/lse_2"}},
		ExtraExtensions: []pkix.Extension{
			{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}, // CA: true
		},
	}
	tests := map[string]struct {
		key          crypto.Signer
		leaf         func([]byte) controlplane.Leaf
		good, bad    x509.ExtKeyUsage
		uris, dns    []string
		addresses    []string
		presentedKey x509.CertificateRequest
	}{
		"client": {
			key: ecdsaKey(t, elliptic.P256()), leaf: clientLeaf, good: x509.ExtKeyUsageClientAuth, bad: x509.ExtKeyUsageServerAuth,
			uris: []string{"depot://srv_1/lease/lse_1", "depot://srv_1/machine/mch_1"},
		},
		"server": {
			key: ecdsaKey(t, elliptic.P384()), leaf: serverLeaf, good: x509.ExtKeyUsageServerAuth, bad: x509.ExtKeyUsageClientAuth,
			dns: []string{"m-1.machine.depot"}, addresses: []string{"192.0.2.7", "2001:db8::7"},
		},
		"client with a greedy request": {
			key: ecdsaKey(t, elliptic.P256()), leaf: clientLeaf, good: x509.ExtKeyUsageClientAuth, bad: x509.ExtKeyUsageServerAuth,
			uris: []string{"depot://srv_1/lease/lse_1", "depot://srv_1/machine/mch_1"}, presentedKey: greedy,
		},
		"client with RSA": {
			key: rsaKey(t, 2048), leaf: clientLeaf, good: x509.ExtKeyUsageClientAuth, bad: x509.ExtKeyUsageServerAuth,
			uris: []string{"depot://srv_1/lease/lse_1", "depot://srv_1/machine/mch_1"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			csr := request(t, test.key, test.presentedKey)
			issued, err := a.Sign(t.Context(), s, "prj_1", test.leaf(csr))
			if err != nil {
				t.Fatal(err)
			}
			if len(issued.Chain) != 2 || !bytes.Equal(issued.Chain[1], s.Certificate) {
				t.Fatalf("the chain is not the leaf and its authority: %d certificates", len(issued.Chain))
			}
			c := parse(t, issued.Chain[0])
			if _, err := c.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{test.good}}); err != nil {
				t.Errorf("not good for its role: %v", err)
			}
			if _, err := c.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{test.bad}}); err == nil {
				t.Error("good for the other role too")
			}
			var uris, addresses []string
			for _, u := range c.URIs {
				uris = append(uris, u.String())
			}
			for _, ip := range c.IPAddresses {
				addresses = append(addresses, ip.String())
			}
			want := [][]string{test.uris, test.dns, test.addresses, nil}
			if d := cmp.Diff(want, [][]string{uris, c.DNSNames, addresses, c.EmailAddresses}); d != "" {
				t.Errorf("names (-want +got):\n%s", d)
			}
			if c.IsCA || c.Subject.String() != "" || c.KeyUsage != x509.KeyUsageDigitalSignature || len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) != 1 {
				t.Errorf("it says more than it should: CA %t, subject %q, key usage %b, extended %v", c.IsCA, c.Subject, c.KeyUsage, c.ExtKeyUsage)
			}
			if c.SerialNumber.BitLen() != 128 || !issued.NotAfter.Equal(c.NotAfter) {
				t.Errorf("serial of %d bits, valid until %s but %s was said", c.SerialNumber.BitLen(), c.NotAfter, issued.NotAfter)
			}
			hash, err := a.KeyHash(csr)
			if got := sha256.Sum256(c.RawSubjectPublicKeyInfo); err != nil || !bytes.Equal(hash, got[:]) {
				t.Errorf("the key's hash is not that of the certificate's key (error %v)", err)
			}
		})
	}
}

func TestSignStaysWithinTheAuthority(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := sealed(t, a, "prj_1")
	authority := parse(t, s.Certificate)
	leaf := clientLeaf(request(t, ecdsaKey(t, elliptic.P256()), x509.CertificateRequest{}))
	leaf.NotBefore, leaf.NotAfter = time.Now().AddDate(-1, 0, 0), time.Now().AddDate(100, 0, 0)
	issued, err := a.Sign(t.Context(), s, "prj_1", leaf)
	if err != nil {
		t.Fatal(err)
	}
	c := parse(t, issued.Chain[0])
	if c.NotBefore.Before(authority.NotBefore) || c.NotAfter.After(authority.NotAfter) {
		t.Errorf("valid from %s to %s, beyond its authority", c.NotBefore, c.NotAfter)
	}
}

// TestBadRequests checks that each is Invalid, for Sign and for KeyHash alike.
func TestBadRequests(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := sealed(t, a, "prj_1")
	good := request(t, ecdsaKey(t, elliptic.P256()), x509.CertificateRequest{})
	forged := bytes.Clone(good)
	forged[len(forged)-1] ^= 1
	tests := map[string]struct {
		csr     []byte
		mention string
	}{
		"nothing":       {nil, "PKCS #10"},
		"text":          {[]byte("-----BEGIN CERTIFICATE REQUEST-----"), "PKCS #10"},
		"trailing data": {append(bytes.Clone(good), 0), "PKCS #10"},
		"cut off":       {good[:len(good)-10], "PKCS #10"},
		"forged":        {forged, "not signed by its own key"},
		"huge":          {make([]byte, 16<<10+1), "16385 bytes"},
		"weak RSA":      {weakRSA(t), "RSA key of 1024 bits"},
		"P-224":         {request(t, ecdsaKey(t, elliptic.P224()), x509.CertificateRequest{}), "P-224"},
		"P-521":         {request(t, ecdsaKey(t, elliptic.P521()), x509.CertificateRequest{}), "P-521"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, signErr := a.Sign(t.Context(), s, "prj_1", clientLeaf(test.csr))
			_, hashErr := a.KeyHash(test.csr)
			for _, err := range []error{signErr, hashErr} {
				if controlplane.CodeOf(err) != controlplane.Invalid || !strings.Contains(err.Error(), test.mention) {
					t.Errorf("got error %v, want Invalid and %q", err, test.mention)
				}
			}
		})
	}
}

func TestGoodKeys(t *testing.T) {
	t.Parallel()
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := newAuthority(t)
	for name, key := range map[string]crypto.Signer{"ed25519": ed, "P-256": ecdsaKey(t, elliptic.P256()), "P-384": ecdsaKey(t, elliptic.P384())} {
		if _, err := a.KeyHash(request(t, key, x509.CertificateRequest{})); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestBadLeaves checks that what our own program asks wrongly is a fault of
// ours, and signs nothing.
func TestBadLeaves(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := sealed(t, a, "prj_1")
	csr := request(t, ecdsaKey(t, elliptic.P256()), x509.CertificateRequest{})
	tests := map[string]func(l *controlplane.Leaf){
		"no usage":           func(l *controlplane.Leaf) { l.Usage = 0 },
		"client with a host": func(l *controlplane.Leaf) { l.DNSNames = []string{"m-1.machine.depot"} },
		"client with an IP":  func(l *controlplane.Leaf) { l.IPs = []string{"192.0.2.7"} },
		"no name":            func(l *controlplane.Leaf) { l.URIs = nil },
		"no time":            func(l *controlplane.Leaf) { l.NotAfter = l.NotBefore },
		"relative URI":       func(l *controlplane.Leaf) { l.URIs = []string{"lease/lse_1"} },
		"no IP":              func(l *controlplane.Leaf) { l.Usage, l.IPs = controlplane.UsageServer, []string{"host"} },
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			leaf := clientLeaf(csr)
			change(&leaf)
			if issued, err := a.Sign(t.Context(), s, "prj_1", leaf); err == nil || controlplane.CodeOf(err) != controlplane.Internal || issued.Chain != nil {
				t.Errorf("got error %v and %d certificates", err, len(issued.Chain))
			}
		})
	}
}

// TestKeysStay checks that a sealed key opens for nobody else.
func TestKeysStay(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	one, two := sealed(t, a, "prj_1"), sealed(t, a, "prj_2")
	leaf := clientLeaf(request(t, ecdsaKey(t, elliptic.P256()), x509.CertificateRequest{}))
	if _, err := a.Sign(t.Context(), one, "prj_1", leaf); err != nil { // one is in memory from now on
		t.Fatal(err)
	}
	stranger, err := ca.New(masterKey(2))
	if err != nil {
		t.Fatal(err)
	}
	damaged := controlplane.SealedAuthority{Certificate: one.Certificate, SealedKey: bytes.Clone(one.SealedKey)}
	damaged.SealedKey[len(damaged.SealedKey)/2] ^= 1
	secret, err := a.Seal("prj_1", []byte("a secret is no authority"))
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		by     *ca.Authority
		sealed controlplane.SealedAuthority
		owner  string
	}{
		"another owner":          {a, one, "prj_2"},
		"another master key":     {stranger, one, "prj_1"},
		"another's certificate":  {a, controlplane.SealedAuthority{Certificate: two.Certificate, SealedKey: one.SealedKey}, "prj_1"},
		"damaged":                {a, damaged, "prj_1"},
		"no key":                 {a, controlplane.SealedAuthority{Certificate: one.Certificate}, "prj_1"},
		"no certificate":         {a, controlplane.SealedAuthority{SealedKey: one.SealedKey}, "prj_1"},
		"a secret, not a key":    {a, controlplane.SealedAuthority{Certificate: one.Certificate, SealedKey: secret}, "prj_1"},
		"of an unknown revision": {a, controlplane.SealedAuthority{Certificate: one.Certificate, SealedKey: append([]byte{9}, one.SealedKey[1:]...)}, "prj_1"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			issued, err := test.by.Sign(t.Context(), test.sealed, test.owner, leaf)
			if err == nil || !strings.Contains(err.Error(), test.owner) || issued.Chain != nil {
				t.Errorf("got error %v and %d certificates", err, len(issued.Chain))
			}
		})
	}
}

func TestSealAndOpen(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	secret := []byte("join key")
	first, err := a.Seal("srv_1", secret)
	if err != nil {
		t.Fatal(err)
	}
	second, err := a.Seal("srv_1", secret)
	if err != nil || bytes.Equal(first, second) {
		t.Errorf("the same secret is sealed the same twice (error %v)", err)
	}
	if got, err := a.Open("srv_1", first); err != nil || !bytes.Equal(got, secret) {
		t.Errorf("got %q and error %v", got, err)
	}
	if got, err := a.Open("srv_2", first); err == nil || !strings.Contains(err.Error(), "master key file") {
		t.Errorf("another owner got %q and error %v", got, err)
	}
	if _, err := a.Open("srv_1", nil); err == nil {
		t.Error("opened nothing")
	}
	if _, err := a.Seal("srv_1", make([]byte, 1<<20)); err == nil {
		t.Error("sealed a megabyte")
	}
	if _, err := ca.New(secret); err == nil {
		t.Error("took a short master key")
	}
}

func TestSignAtOnce(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := sealed(t, a, "prj_1")
	leaf := clientLeaf(request(t, ecdsaKey(t, elliptic.P256()), x509.CertificateRequest{}))
	var mu sync.Mutex
	serials := map[string]bool{}
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			issued, err := a.Sign(t.Context(), s, "prj_1", leaf)
			if err != nil {
				t.Error(err)
				return
			}
			c, err := x509.ParseCertificate(issued.Chain[0])
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			serials[c.SerialNumber.String()] = true
		})
	}
	wg.Wait()
	if len(serials) != 16 {
		t.Errorf("16 certificates have %d serial numbers", len(serials))
	}
}

func FuzzKeyHash(f *testing.F) {
	a := newAuthority(f)
	f.Add(request(f, ecdsaKey(f, elliptic.P256()), x509.CertificateRequest{}))
	f.Add([]byte{0x30, 0x80})
	f.Fuzz(func(t *testing.T, csr []byte) {
		hash, err := a.KeyHash(csr)
		if (err == nil) != (len(hash) == sha256.Size) || err != nil && controlplane.CodeOf(err) != controlplane.Invalid {
			t.Errorf("got %d bytes and error %v", len(hash), err)
		}
	})
}

// weakRSA returns a request with a key of 1024 bits, made once with OpenSSL: Go
// refuses to make one.
func weakRSA(t *testing.T) []byte {
	t.Helper()
	csr, err := base64.StdEncoding.DecodeString(
		"MIIBTjCBuAIBADAPMQ0wCwYDVQQDDAR3ZWFrMIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDF5398n33D6C60SH/xJRryBsKg" +
			"hGPRG9rIPt1ud09Ezg0aylxrUuG3uDPKgGwpPB1eAG+lJsuV1WQ31qGyX+SfrXHeY3AvV/bRlSjPS4Ay8v7GWdOrNipCDrDVr4l2" +
			"+oIFNZqCNmxmWbrFwM9baeuT7Xjz3PtU9DRl3+X2d2v9lQIDAQABoAAwDQYJKoZIhvcNAQELBQADgYEAmJLkNZ9/cPD8qmenepVJ" +
			"PcC/ITprDAbPI7RgtW8nwERRIHO/yfvgBwkY4uVwbjj+e9qrfjOOIa9eFnyurdiVhOcNWETXCLcGfcZI1WkfY/WjNAopoC/ElEuR" +
			"uaD12+YbRqJrn9xzgny6SGLQIT5jD9Psn9lqt9m86+FsGlAlWCM=")
	if err != nil {
		t.Fatal(err)
	}
	return csr
}
