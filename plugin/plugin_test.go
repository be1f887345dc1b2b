package plugin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/docker/buildx/util/cobrautil"
	"github.com/docker/cli/cli"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestReport(t *testing.T) {
	for name, tt := range map[string]struct {
		err  error
		code int
		text string
	}{
		"success":              {},
		"an error":             {err: errors.New("no"), code: 1, text: "ERROR: no\n"},
		"a status":             {err: cli.StatusError{Status: "usage", StatusCode: 125}, code: 125, text: "usage\n"},
		"a status of zero":     {err: cli.StatusError{}, code: 1},
		"a code without words": {err: fmt.Errorf("x: %w", cobrautil.ExitCodeError(7)), code: 7},
		"internal":             {err: status.Error(codes.Internal, "no"), code: 100, text: "ERROR: rpc error: code = Internal desc = no\n"},
		"exhausted":            {err: status.Error(codes.ResourceExhausted, "no"), code: 102, text: "ERROR: rpc error: code = ResourceExhausted desc = no\n"},
		"cancelled there":      {err: status.Error(codes.Canceled, "no"), code: 130, text: "ERROR: rpc error: code = Canceled desc = no\n"},
		"cancelled here":       {err: fmt.Errorf("build: %w", context.Canceled), code: 130, text: "ERROR: build: context canceled\n"},
	} {
		t.Run(name, func(t *testing.T) {
			var w bytes.Buffer
			if code := report(&w, tt.err); code != tt.code || w.String() != tt.text {
				t.Errorf("code %d and %q, want %d and %q", code, &w, tt.code, tt.text)
			}
		})
	}
}

func TestForDepot(t *testing.T) {
	for name, tt := range map[string]struct {
		args   []string
		want   bool
		driver string
	}{
		"nothing":            {},
		"the driver":         {args: []string{"--driver", "depot"}, want: true, driver: "depot"},
		"the endpoint":       {args: []string{"depot://h/o/p"}, want: true, driver: "depot"},
		"both":               {args: []string{"--driver", "depot", "depot://h/o/p"}, want: true, driver: "depot"},
		"another driver":     {args: []string{"--driver", "remote", "tcp://h"}, driver: "remote"},
		"another endpoint":   {args: []string{"desktop-linux"}},
		"leaving, not doing": {args: []string{"--driver", "depot", "--leave"}, driver: "depot"},
	} {
		t.Run(name, func(t *testing.T) {
			var got bool
			cmd := &cobra.Command{Use: "create", RunE: func(cmd *cobra.Command, args []string) (err error) {
				got, err = forDepot(cmd, args)
				return err
			}}
			chosen := cmd.Flags().String("driver", "", "")
			cmd.Flags().Bool("leave", false, "")
			cmd.SetArgs(append([]string{}, tt.args...))
			if err := cmd.ExecuteContext(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got != tt.want || *chosen != tt.driver {
				t.Errorf("got %v with driver %q, want %v with %q", got, *chosen, tt.want, tt.driver)
			}
		})
	}
}
