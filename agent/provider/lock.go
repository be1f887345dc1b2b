package provider

import (
	"errors"
	"syscall"
	"time"
)

// lockPatience is how long Lock asks again, and lockPoll how often.
const (
	lockPatience = 500 * time.Millisecond
	lockPoll     = 5 * time.Millisecond
)

// Lock calls take, which tries to take a lock without waiting, again and again
// for a moment while the lock is held (EAGAIN or EACCES). A lock that has just
// been given up may seem held: whatever its holder had forked keeps a copy of
// it until the exec is through, even when the holder itself was killed.
func Lock(take func() error) error {
	for until := time.Now().Add(lockPatience); ; <-time.After(lockPoll) {
		err := take()
		held := errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EACCES)
		if !held || time.Now().After(until) {
			return err
		}
	}
}
