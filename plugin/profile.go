package plugin

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/pprof"
)

// startProfiles writes the profiles that buildx's variables ask for:
// BUILDX_CPU_PROFILE and BUILDX_MEM_PROFILE each name a file. The returned
// function ends them.
func startProfiles(env func(string) string, warn io.Writer) (stop func()) {
	stopCPU := startCPU(env("BUILDX_CPU_PROFILE"), warn)
	return func() {
		stopCPU()
		if err := writeHeap(env("BUILDX_MEM_PROFILE")); err != nil {
			fmt.Fprintf(warn, "WARNING: memory profile: %v\n", err) //nolint:errcheck // a warning that nobody can read is lost
		}
	}
}

func startCPU(name string, warn io.Writer) (stop func()) {
	if name == "" {
		return func() {}
	}
	f, err := os.Create(name) //nolint:gosec // the user names the file
	if err == nil {
		err = pprof.StartCPUProfile(f)
	}
	if err != nil {
		fmt.Fprintf(warn, "WARNING: CPU profile: %v\n", err) //nolint:errcheck // a warning that nobody can read is lost
		return func() {}
	}
	return func() {
		pprof.StopCPUProfile()
		if err := f.Close(); err != nil {
			fmt.Fprintf(warn, "WARNING: CPU profile: %v\n", err) //nolint:errcheck // a warning that nobody can read is lost
		}
	}
}

func writeHeap(name string) error {
	if name == "" {
		return nil
	}
	f, err := os.Create(name) //nolint:gosec // the user names the file
	if err != nil {
		return err
	}
	runtime.GC() // the profile is as of the last collection
	err = pprof.WriteHeapProfile(f)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}
