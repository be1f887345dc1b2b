package site

import (
	"path/filepath"
	"strings"
)

// AddProcess returns one more program for a network namespace of the site's,
// not started; it is stopped at the end. If its first argument is a bare name,
// it is one of the built programs.
func (s *Site) AddProcess(tb TB, name string, net *Netns, args ...string) *Process {
	tb.Helper()
	if !strings.Contains(args[0], "/") {
		args[0] = filepath.Join(s.bin, args[0])
	}
	p := s.process(name, net, args...)
	tb.Cleanup(func() { p.Stop(tb) })
	return p
}

// Wait waits until the program has ended and returns its exit code; -1 if a
// signal ended it.
func (p *Process) Wait(tb TB) int {
	tb.Helper()
	ended := p.Ended()
	Eventually(tb, p.Name+" ends", func() bool {
		select {
		case <-ended:
			return true
		default:
			return false
		}
	})
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cmd.ProcessState.ExitCode()
}
