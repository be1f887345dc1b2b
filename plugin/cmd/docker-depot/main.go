// Docker-depot is the Docker CLI plugin, installed as docker-buildx and as
// docker-depot. Build it with
//
//	-ldflags "-X github.com/docker/buildx/version.Version=v0.37.2+depot…"
//
// or Compose refuses it for its version.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/opendepot/depot/plugin"
)

func main() {
	dir, err := os.Getwd()
	if err != nil {
		fmt.Fprintln(os.Stderr, "working directory:", err)
		os.Exit(1)
	}
	os.Exit(plugin.Run(context.Background(), plugin.Process{Args: os.Args, Env: os.Getenv, Dir: dir}))
}
