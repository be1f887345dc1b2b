package machine

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// siginfoPID returns si_pid, which package unix leaves in the padding: on
// 64-bit Linux it is the first member of the union, at byte 16 (sigaction(2);
// include/uapi/asm-generic/siginfo.h).
func siginfoPID(info *unix.Siginfo) int {
	const offset = 16
	return int(*(*int32)(unsafe.Add(unsafe.Pointer(info), offset))) //nolint:gosec // see above
}
