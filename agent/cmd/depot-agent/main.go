// Depot-agent runs on the hosts that build. `depot-agent cloud` serves a
// control plane: it launches machines and keeps volumes. `depot-agent machine`
// is what it launches: PID 1 of a machine, in front of buildkitd.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// version is set when the program is linked.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	// A machine counts its signals itself: the first asks, the second insists.
	terminate := make(chan os.Signal, 8)
	signal.Notify(terminate, unix.SIGTERM, unix.SIGINT)
	err := execute(ctx, world{
		args: os.Args[1:], lookup: os.LookupEnv, out: os.Stdout, errOut: os.Stderr, terminate: terminate, version: version,
	})
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "depot-agent: %v\n", err)
		os.Exit(1)
	}
}

// world is what the program is given by its surroundings.
type world struct {
	args        []string
	lookup      func(string) (string, bool)
	out, errOut io.Writer
	terminate   <-chan os.Signal
	version     string
}
