//go:build !linux

package driver

import "net"

// newDialer returns a dialer whose connections notice a machine that is gone.
func newDialer() *net.Dialer {
	return &net.Dialer{Timeout: dialTimeout, KeepAliveConfig: keepAlive()}
}
