package mtls

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// LeafName is what a client's certificate opens (own-lease): one machine, for
// one lease, of one control plane. The certificate carries it as exactly two
// URIs, and no other name:
//
//	depot://<server-id>/lease/<lease-id>
//	depot://<server-id>/machine/<machine-id>
type LeafName struct {
	// Server, Lease and Machine are ids: srv_…, lse_…, mch_….
	Server, Lease, Machine string
}

// URIs returns the two URIs to put into the certificate.
func (n LeafName) URIs() []*url.URL {
	return []*url.URL{
		{Scheme: "depot", Host: n.Server, Path: "/lease/" + n.Lease},
		{Scheme: "depot", Host: n.Server, Path: "/machine/" + n.Machine},
	}
}

// ParseLeafName reads the name of a client's certificate. A certificate with
// any other name beside it, or with ids that are none, is an error.
func ParseLeafName(leaf *x509.Certificate) (LeafName, error) {
	if len(leaf.URIs) != 2 || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) > 0 {
		return LeafName{}, errors.New("the certificate does not name one lease and one machine")
	}
	n := LeafName{Server: leaf.URIs[0].Host}
	for _, u := range leaf.URIs {
		switch kind, id, _ := strings.Cut(strings.TrimPrefix(u.Path, "/"), "/"); kind {
		case "lease":
			n.Lease = id
		case "machine":
			n.Machine = id
		}
	}
	// Whatever the URLs hold besides (a user, a port, a query, another order)
	// shows in this comparison.
	for i, want := range n.URIs() {
		if got := leaf.URIs[i].String(); got != want.String() {
			return LeafName{}, fmt.Errorf("the certificate's name %q is not that of a lease or a machine", got)
		}
	}
	for prefix, id := range map[string]string{"srv_": n.Server, "lse_": n.Lease, "mch_": n.Machine} {
		if !validID(prefix, id) {
			return LeafName{}, fmt.Errorf("the certificate names %q, which is no id of the kind %s…", id, prefix)
		}
	}
	return n, nil
}

// validID checks the form that all ids of the protocol have: a kind's prefix
// and 32 lower-case hexadecimal digits.
func validID(prefix, id string) bool {
	digits, ok := strings.CutPrefix(id, prefix)
	if !ok || len(digits) != 32 {
		return false
	}
	return strings.Trim(digits, "0123456789abcdef") == ""
}
