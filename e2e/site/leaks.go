package site

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// checkLeaks fails the test if anything of the site is left on the machine. It
// runs after all clean-ups of the site.
func (s *Site) checkLeaks() {
	var left []string
	within(10*time.Second, func() bool {
		left = append(s.leftProcesses(), s.leftMounts()...)
		left = append(left, s.leftLoops()...)
		return len(left) == 0
	})
	for _, l := range left {
		s.tb.Errorf("left behind: %s", l)
	}
	if s.tb.Failed() {
		s.logLogs()
	}
}

// leftProcesses are processes that were started from or in the site's
// directory, or that live in one of its namespaces.
func (s *Site) leftProcesses() []string {
	var left []string
	for _, pid := range pids() {
		line, err := os.ReadFile(filepath.Join("/proc", pid, "cmdline"))
		if err != nil {
			continue
		}
		if strings.Contains(string(line), s.Dir) {
			left = append(left, "process "+pid+": "+strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return left
}

func pids() []string {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err == nil && e.Name() != strconv.Itoa(os.Getpid()) {
			out = append(out, e.Name())
		}
	}
	return out
}

func (s *Site) leftMounts() []string {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return []string{err.Error()}
	}
	var left []string
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, s.Dir) {
			left = append(left, "mount "+strings.TrimSpace(line))
		}
	}
	return left
}

func (s *Site) leftLoops() []string {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return []string{err.Error()}
	}
	var left []string
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), s.Dir) {
			left = append(left, "loop device "+f+": "+strings.TrimSpace(string(b)))
		}
	}
	return left
}

// logLogs shows the ends of all logs of a failed test.
func (s *Site) logLogs() {
	logs := []string{filepath.Join(s.Dir, "controlplane.log")}
	for _, h := range s.hosts {
		logs = append(logs, h.Agent.log)
	}
	for _, f := range logs {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		const most = 6000
		s.tb.Logf("%s:\n%s", filepath.Base(f), b[max(0, len(b)-most):])
	}
}
