package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/docker/buildx/util/cobrautil"
	"github.com/docker/buildx/util/desktop"
	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/debug"
	solvererrdefs "github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/sourcepolicy/policysession"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/moby/buildkit/util/stack"
	"google.golang.org/grpc/codes"
)

// The exit codes beside 1 that buildx documents.
const (
	exitInternal  = 100
	exitExhausted = 102
	exitCancelled = 130
)

// report prints how a command failed, as buildx does, and returns the exit
// code. A nil error is 0 and says nothing.
func report(w io.Writer, err error) int {
	if err == nil {
		return 0
	}
	if status, ok := errors.AsType[cli.StatusError](err); ok {
		if status.Status != "" {
			fmt.Fprintln(w, status.Status) //nolint:errcheck // there is nowhere else to say it
		}
		return max(1, status.StatusCode)
	}
	if code, ok := errors.AsType[cobrautil.ExitCodeError](err); ok { // it was said before
		return int(code)
	}
	for _, m := range policysession.DenyMessages(err) {
		if m.GetMessage() != "" {
			fmt.Fprintln(w, "Policy: "+m.GetMessage()) //nolint:errcheck // there is nowhere else to say it
		}
	}
	for _, s := range solvererrdefs.Sources(err) {
		_ = s.Print(w)
	}
	if debug.IsEnabled() {
		fmt.Fprintf(w, "ERROR: %+v", stack.Formatter(err)) //nolint:errcheck // there is nowhere else to say it
	} else {
		fmt.Fprintf(w, "ERROR: %v\n", err) //nolint:errcheck // there is nowhere else to say it
	}
	if build, ok := errors.AsType[*desktop.ErrorWithBuildRef](err); ok {
		_ = build.Print(w)
	}
	return exitCode(err)
}

// exitCode is buildx's mapping of errors that name no code of their own.
func exitCode(err error) int {
	switch grpcerrors.Code(err) {
	case codes.Internal:
		return exitInternal
	case codes.ResourceExhausted:
		return exitExhausted
	case codes.Canceled:
		return exitCancelled
	default:
		if errors.Is(err, context.Canceled) {
			return exitCancelled
		}
		return 1
	}
}
