//go:build linux

// Command which writes what it was compiled for, and what the kernel tells it
// that it runs on, into the file that its argument names.
package main

import (
	"os"
	"runtime"
	"runtime/debug"
	"syscall"
)

func main() {
	var name syscall.Utsname
	if err := syscall.Uname(&name); err != nil {
		panic(err)
	}
	var machine []byte
	for _, c := range name.Machine {
		if c == 0 {
			break
		}
		machine = append(machine, byte(c))
	}
	variant := ""
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "GOARM" {
				variant = "v" + s.Value[:1]
			}
		}
	}
	line := os.Getenv("BUILDPLATFORM") + " " + runtime.GOARCH + variant + " " + string(machine) + "\n"
	if err := os.WriteFile(os.Args[1], []byte(line), 0o644); err != nil {
		panic(err)
	}
}
