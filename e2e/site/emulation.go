package site

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// EmulatedArch is the architecture that this machine emulates in tests.
func EmulatedArch() string {
	if NativeArch() == "amd64" {
		return "arm64"
	}
	return "amd64"
}

// CheckEmulation fails the test if, at its end, the kernel is left with an
// agent's handlers that no agent of this machine uses. Call it before AddHost.
func CheckEmulation(tb TB) {
	tb.Helper()
	const misc = "/proc/sys/fs/binfmt_misc"
	tb.Cleanup(func() {
		// Agents that use handlers hold this lock, shared.
		lock, err := os.OpenFile(filepath.Join(misc, "register"), os.O_WRONLY, 0)
		if err != nil {
			tb.Errorf("look for handlers: %v", err)
			return
		}
		defer lock.Close() //nolint:errcheck // which unlocks it
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
			return
		}
		left, err := filepath.Glob(filepath.Join(misc, "depot-*"))
		if err != nil || len(left) > 0 {
			tb.Errorf("left behind: handlers %v, %v", left, err)
		}
	})
}
