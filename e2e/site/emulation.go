package site

import (
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

// TakeEmulation makes the test the only one on this machine with emulated
// pools, as the kernel's handlers are the whole machine's; it waits for its
// turn. Call it before AddHost. At the end it fails the test if an agent has
// left handlers behind.
func TakeEmulation(tb TB) {
	tb.Helper()
	const interpreters = "/usr/libexec/qemu-binfmt" // also a file that is there to be locked
	lock, err := os.Open(interpreters)
	if err != nil {
		tb.Fatalf("Debian's qemu-user-static is needed: %v", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		tb.Fatalf("lock %s: %v", interpreters, err)
	}
	tb.Cleanup(func() {
		defer lock.Close() //nolint:errcheck // which unlocks it
		left, err := filepath.Glob("/proc/sys/fs/binfmt_misc/depot-*")
		if err != nil || len(left) > 0 {
			tb.Errorf("left behind: handlers %v, %v", left, err)
		}
	})
}
