package driver

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// userTimeout is how long sent bytes may stay unacknowledged before the
// connection counts as broken (TCP_USER_TIMEOUT, tcp(7)). Without it, Linux
// keeps trying for a quarter of an hour.
const userTimeout = 30 * time.Second

// newDialer returns a dialer whose connections notice a machine that is gone.
// gRPC's own pings will not do: buildkitd takes more than one in five minutes
// for abuse and hangs up.
func newDialer() *net.Dialer {
	return &net.Dialer{
		Timeout:         dialTimeout,
		KeepAliveConfig: keepAlive(),
		Control: func(_, _ string, c syscall.RawConn) error {
			var err error
			if cerr := c.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
			}); cerr != nil {
				return cerr
			}
			return err
		},
	}
}
