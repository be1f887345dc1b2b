package provider_test

import (
	"errors"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opendepot/depot/agent/provider"
)

func TestLock(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		free time.Duration // when the lock is given up
		held error
		want error
	}{
		"free":            {0, syscall.EAGAIN, nil},
		"free in a while": {100 * time.Millisecond, syscall.EAGAIN, nil},
		"held":            {time.Hour, syscall.EACCES, syscall.EACCES},
		"broken":          {time.Hour, syscall.EIO, syscall.EIO},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				err := provider.Lock(func() error {
					if time.Since(began) >= tt.free {
						return nil
					}
					return tt.held
				})
				if !errors.Is(err, tt.want) {
					t.Errorf("got %v after %s, want %v", err, time.Since(began), tt.want)
				}
				if waited := time.Since(began); waited > time.Second || errors.Is(tt.held, syscall.EIO) && waited > 0 {
					t.Errorf("waited %s", waited)
				}
			})
		})
	}
}
