package auth

import (
	"crypto/hmac"
	"crypto/sha256"
	"strings"

	"github.com/opendepot/depot/controlplane"
)

// machinePrefix starts the text of a machine's join token.
const machinePrefix = "depot_machine_"

// MachineToken is [JoinToken].
func (*Authenticator) MachineToken(key []byte, machine string) string { return JoinToken(key, machine) }

// CheckMachineToken is [CheckJoin].
func (*Authenticator) CheckMachineToken(key []byte, machine, text string) bool {
	return CheckJoin(key, machine, text)
}

// JoinToken returns the join token of a machine: an HMAC-SHA256 of its id under
// key, so that it can be made again for an order that is repeated, and nothing
// of it is stored. It reads depot_machine_<32 id digits>_<52 base32 digits>.
func JoinToken(key []byte, machineID string) string {
	return machinePrefix + strings.TrimPrefix(machineID, string(controlplane.KindMachine)+"_") + "_" +
		base32Encoding().EncodeToString(joinMAC(key, machineID))
}

// CheckJoin reports whether token is the join token of that machine, in a time
// that does not depend on where they differ.
func CheckJoin(key []byte, machineID, token string) bool {
	return len(key) > 0 && controlplane.ValidID(controlplane.KindMachine, machineID) &&
		hmac.Equal([]byte(token), []byte(JoinToken(key, machineID)))
}

// joinMAC binds the purpose as well: the key makes nothing but join tokens.
func joinMAC(key []byte, machineID string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte("depot machine join\x00" + machineID)) // a hash never fails
	return h.Sum(nil)
}
