package controlplane

import (
	"slices"
	"time"
)

// Organization owns projects, members, tokens and usage.
type Organization struct {
	ID   string
	Name string
	// Created is when it was stored, UTC.
	Created time.Time
}

// Project is a cache namespace with its settings. Nothing of it is shared with
// another project: no machine, no volume, no certificate authority.
type Project struct {
	ID   string
	Org  string // the organization's id
	Name string // unique in its organization
	// Size names the machine size in the server's configuration.
	Size string
	// IdleTimeout is how long a machine without a lease is kept ready.
	IdleTimeout time.Duration
	// MaxBuildsPerMachine bounds the leases on one machine; 0 means no bound.
	MaxBuildsPerMachine int
	// MaxMachines bounds the machines per architecture; at least 1.
	MaxMachines int
	// CacheKeep is how long an unused cache record is kept; CacheBytes bounds
	// the live tree.
	CacheKeep  time.Duration
	CacheBytes int64
	// Entitlements are BuildKit's entitlements (network.host,
	// security.insecure) that the project's trusted builds may ask for.
	Entitlements []string
	// Authority is the project's certificate authority: certificates in the
	// clear, keys sealed by the master key.
	Authority SealedAuthority
	// Request is the id of the request that made it, for its repetition.
	Request string
	Created time.Time
}

// SealedAuthority is a certificate authority as it is stored.
type SealedAuthority struct {
	// Certificate is the CA certificate, DER.
	Certificate []byte
	// SealedKey is the PKCS #8 key, sealed with an AEAD under the master key
	// with the owner's id as additional data (keys-stay).
	SealedKey []byte
}

// Size is what a machine of that name gets.
type Size struct {
	Name        string
	CPUs        int
	MemoryBytes int64
}

// The defaults of a new project.
const (
	DefaultSize        = "default"
	DefaultIdleTimeout = 2 * time.Minute
	DefaultCacheKeep   = 14 * 24 * time.Hour
	DefaultCacheBytes  = 50 << 30
)

// DefaultSizes are the sizes that every server knows: 16, 32 and 64 CPUs.
func DefaultSizes() []Size {
	return []Size{
		{Name: DefaultSize, CPUs: 16, MemoryBytes: 32 << 30},
		{Name: "large", CPUs: 32, MemoryBytes: 64 << 30},
		{Name: "xlarge", CPUs: 64, MemoryBytes: 128 << 30},
	}
}

// Entitlements that a project may open, by BuildKit's names.
func Entitlements() []string { return []string{"network.host", "security.insecure"} }

// Validate reports the first setting of p that cannot be, given the sizes that
// the server knows.
func (p Project) Validate(sizes []Size) error {
	if err := validName("project", p.Name); err != nil {
		return err
	}
	if !slices.ContainsFunc(sizes, func(s Size) bool { return s.Name == p.Size }) {
		return Errorf(Invalid, "size %q is not known to this server: use one of %s", p.Size, sizeNames(sizes))
	}
	switch {
	case p.IdleTimeout < 0 || p.IdleTimeout > 24*time.Hour:
		return Errorf(Invalid, "idle timeout %s is out of range: use 0s to 24h", p.IdleTimeout)
	case p.MaxBuildsPerMachine < 0:
		return Errorf(Invalid, "max builds per machine %d is negative: use 0 for no bound", p.MaxBuildsPerMachine)
	case p.MaxMachines < 1:
		return Errorf(Invalid, "max machines %d is too small: use at least 1", p.MaxMachines)
	case p.CacheKeep < time.Hour:
		return Errorf(Invalid, "cache keep %s is too short: use at least 1h", p.CacheKeep)
	case p.CacheBytes < 1<<30:
		return Errorf(Invalid, "cache size %d bytes is too small: use at least 1GB", p.CacheBytes)
	}
	for _, e := range p.Entitlements {
		if !slices.Contains(Entitlements(), e) {
			return Errorf(Invalid, "entitlement %q is not known: use network.host or security.insecure", e)
		}
	}
	return nil
}

// Validate reports whether the organization's name can be.
func (o Organization) Validate() error { return validName("organization", o.Name) }

func sizeNames(sizes []Size) []string {
	names := make([]string, len(sizes))
	for i, s := range sizes {
		names[i] = s.Name
	}
	return names
}

// validName allows what fits a URL's path and a DNS label: lower-case letters,
// digits and inner hyphens, at most 63.
func validName(noun, name string) error {
	ok := name != "" && len(name) <= 63 && name[0] != '-' && name[len(name)-1] != '-'
	for _, c := range name {
		ok = ok && (c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-')
	}
	if !ok {
		return Errorf(Invalid, "%s name %q is not valid: use 1 to 63 lower-case letters, digits and inner hyphens", noun, name)
	}
	return nil
}
