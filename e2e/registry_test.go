package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/opendepot/depot/e2e/site"
)

// scannerDockerfile makes a scanner of images, as BuildKit's protocol for SBOM
// generators (docs/attestations/sbom-protocol.md there) wants it.
const scannerDockerfile = `FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox","--install","-s","/bin"]
COPY --chmod=755 <<'END' /scan
#!/bin/sh
cat > "$BUILDKIT_SCAN_DESTINATION/scan.spdx.json" <<STATEMENT
{"_type": "https://in-toto.io/Statement/v0.1", "predicateType": "https://spdx.dev/Document",
 "predicate": {"SPDXID": "SPDXRef-DOCUMENT", "name": "$(echo "$BUILDKIT_SCAN_SOURCE"/*)"}}
STATEMENT
END
ENTRYPOINT ["/scan"]
`

// TestRegistry pushes to, and pulls from, a registry whose authority the hosts
// were given: base images, and the scanner of an SBOM.
func TestRegistry(t *testing.T) {
	t.Parallel()
	s := site.New(t, site.Config{})
	s.AddPeerAddress(t)
	s.StartRegistry(t)
	address, authority := serveTLS(t, s)
	s.AddHost(t, site.HostConfig{Flags: []string{"--allow", address, "--ca-file", authority}})
	s.CreateProject(t, "web", nil)
	home := s.NewHome(t, s.ProjectToken(t, "web"))
	home.CreateBuilder(t, "web")
	build := func(tag string, dockerfile string, args ...string) site.Result {
		dir := site.Context(t, map[string]string{"Dockerfile": dockerfile})
		return home.Buildx(t, append([]string{"build", "--progress", "plain", "-t", address + "/" + tag, "--push", dir}, args...)...)
	}
	build("scanner", scannerDockerfile)

	r := build("app", "FROM "+address+"/scanner\nRUN [\"/bin/touch\", \"/marker\"]\n", "--pull", "--no-cache",
		"--attest", "type=sbom,generator="+address+"/scanner")
	if !strings.Contains(r.All(), "FROM "+address+"/scanner") {
		t.Errorf("the base image was not pulled:\n%s", r.All())
	}
	var index ocispecs.Index
	fetchJSON(t, s, "app", "manifests/latest", &index)
	if sbom := attestation(t, s, "app", index, "https://spdx.dev/Document"); !strings.Contains(sbom, "marker") {
		t.Errorf("the SBOM is not of the image: %q", sbom)
	}
}

// serveTLS puts TLS in front of the site's registry, and returns its address
// and the file with its authority.
func serveTLS(t *testing.T, s *site.Site) (address, authority string) {
	t.Helper()
	address, authority = site.PeerAddress+":5443", filepath.Join(t.TempDir(), "ca.pem")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.ParseIP(site.PeerAddress)},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, authority, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	listener, err := s.HostNet.Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	behind := &url.URL{Scheme: "http", Host: "127.0.0.1:5000"}
	server := &http.Server{
		Handler: &httputil.ReverseProxy{
			Transport: &http.Transport{DialContext: s.HostNet.Dial, DisableKeepAlives: true},
			Rewrite: func(r *httputil.ProxyRequest) {
				r.SetURL(behind)
				r.SetXForwarded()
				r.Out.Host = r.In.Host
			},
		},
		TLSConfig: &tls.Config{
			Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS12,
		},
		ReadHeaderTimeout: time.Minute,
		ErrorLog:          slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.ServeTLS(listener, "", "")
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-served
	})
	return address, authority
}
