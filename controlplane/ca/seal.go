package ca

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/opendepot/depot/controlplane"
)

const (
	// masterKeyBytes is the size of a master key: AES-256's.
	masterKeyBytes = 32
	// maxSecret bounds what is sealed, in bytes.
	maxSecret = 64 << 10
	// sealVersion is the first byte of all that is sealed.
	sealVersion = 1
	// maxSigners bounds the unsealed authorities in memory, about 2 kB each.
	maxSigners = 1024
)

// purpose keeps sealed values of one kind from being opened as another.
type purpose string

const (
	purposeAuthority purpose = "depot authority key"
	purposeSecret    purpose = "depot secret"
)

// newSealer returns AES-256-GCM with a random nonce in front of the ciphertext.
// 96-bit random nonces are safe for 2^32 values under one key (NIST SP
// 800-38D, section 8.3); a control plane seals one per project.
func newSealer(masterKey []byte) (cipher.AEAD, error) {
	if len(masterKey) != masterKeyBytes {
		return nil, fmt.Errorf("the master key has %d bytes instead of %d", len(masterKey), masterKeyBytes)
	}
	block, err := aes.NewCipher(masterKey)
	if err != nil {
		return nil, fmt.Errorf("set up the master key: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("set up the master key: %w", err)
	}
	return aead, nil
}

func seal(aead cipher.AEAD, p purpose, owner string, secret []byte) []byte {
	return aead.Seal([]byte{sealVersion}, nil, secret, additional(p, owner))
}

func open(aead cipher.AEAD, p purpose, owner string, sealed []byte) ([]byte, error) {
	if len(sealed) == 0 || sealed[0] != sealVersion {
		return nil, errors.New("it is damaged, or was sealed by a newer depot")
	}
	secret, err := aead.Open(nil, nil, sealed[1:], additional(p, owner))
	if err != nil {
		return nil, errors.New("it was sealed with another master key, or for another owner: put back the master key file that belongs to this data directory")
	}
	return secret, nil
}

func additional(p purpose, owner string) []byte {
	return []byte(string(p) + "\x00" + owner)
}

// signer is an authority with its key unsealed.
type signer struct {
	certificate *x509.Certificate
	key         crypto.Signer
}

// signerID names a sealed authority by all that unsealing depends on, so that
// a key in memory is never found under another owner or certificate.
type signerID [sha256.Size]byte

func signerIDOf(sealed controlplane.SealedAuthority, owner string) signerID {
	var b []byte
	for _, part := range [][]byte{[]byte(owner), sealed.Certificate, sealed.SealedKey} {
		b = binary.BigEndian.AppendUint64(b, uint64(len(part)))
		b = append(b, part...)
	}
	return sha256.Sum256(b)
}

// signers keeps unsealed authorities in memory, maxSigners at most.
type signers struct {
	mu   sync.Mutex // guards byID
	byID map[signerID]*signer
}

func (s *signers) get(id signerID) *signer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byID[id]
}

func (s *signers) put(id signerID, v *signer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byID == nil {
		s.byID = make(map[signerID]*signer)
	}
	if len(s.byID) >= maxSigners {
		for any := range s.byID { // any one: unsealing again is cheap
			delete(s.byID, any)
			break
		}
	}
	s.byID[id] = v
}
