package depotcmd

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/cli/cli/command/inspect"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// listOptions are the flags of every listing.
type listOptions struct {
	format string
	quiet  bool
}

func (o *listOptions) install(cmd *cobra.Command) {
	cmd.Flags().StringVar(&o.format, "format", "table",
		`Format output: "table", "table TEMPLATE" with headers, "json" with one object per line, or a Go template`)
	cmd.Flags().BoolVarP(&o.quiet, "quiet", "q", false, "Only print ids")
	completeWith(cmd, "format", "table", "json")
}

// row is a line of a listing. Its exported fields are what a template may name
// and what JSON shows; FullHeader gives each its column's head.
type row interface {
	formatter.SubContext
	id() string
}

// list writes rows. The table is docker's template for the standard table,
// like `{{.ID}}\t{{.Name}}`.
func list[R row](out io.Writer, o listOptions, table string, rows []R) error {
	format := formatter.Format(o.format)
	switch {
	case o.quiet:
		for _, r := range rows {
			if _, err := fmt.Fprintln(out, r.id()); err != nil {
				return err
			}
		}
		return nil
	case o.format == "", o.format == formatter.TableFormatKey:
		format = formatter.Format(formatter.TableFormatKey + " " + table)
	}
	var none R
	ctx := formatter.Context{Output: out, Format: format}
	err := ctx.Write(none, func(write func(formatter.SubContext) error) error {
		for _, r := range rows {
			if err := write(r); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return cli.StatusError{StatusCode: usageExitCode, Status: err.Error()}
	}
	return nil
}

// inspectAll writes what find returns for each name, as docker's inspect does:
// a JSON array, or a template's output per item.
func inspectAll(out io.Writer, names []string, format string, find func(name string) (any, error)) error {
	return inspect.Inspect(out, names, format, func(name string) (any, []byte, error) {
		item, err := find(name)
		if err != nil {
			return nil, nil, err
		}
		raw, err := json.Marshal(item)
		return item, raw, err
	})
}

// ago says how long t is past, like docker's listings; "never" if it is unset.
func ago(t *timestamppb.Timestamp, now time.Time) string {
	if t == nil {
		return "never"
	}
	return units.HumanDuration(max(now.Sub(t.AsTime()), 0)) + " ago"
}

// until says how far t is ahead; "never" if it is unset.
func until(t *timestamppb.Timestamp, now time.Time) string {
	switch {
	case t == nil:
		return "never"
	case t.AsTime().Before(now):
		return "expired"
	default:
		return "in " + units.HumanDuration(t.AsTime().Sub(now))
	}
}

// timeOf is t for JSON: nil if it is unset.
func timeOf(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	v := t.AsTime()
	return &v
}

// yesNo is how listings show a truth.
func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// duration shows d as people write it: 2m, 336h.
func duration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// confirm asks before something is deleted. Without a terminal it refuses, so
// that a script says --force where it means it.
func (a *app) confirm(ctx context.Context, question string) error {
	if !a.cli.In().IsTerminal() {
		return fmt.Errorf("%s There is no terminal to ask on: repeat the command with --force to do it", question)
	}
	fmt.Fprintf(a.cli.Err(), "%s [y/N] ", question) //nolint:errcheck // a lost prompt is answered with no
	answer := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(a.cli.In()).ReadString('\n') // the end of input is a no
		answer <- line
	}()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case line := <-answer:
		switch strings.ToLower(strings.TrimSpace(line)) {
		case "y", "yes":
			return nil
		}
		return errors.New("nothing was changed")
	}
}

// each runs do for every name, prints the names that succeeded, and returns
// all that went wrong.
func (a *app) each(names []string, do func(name string) error) error {
	var errs []error
	for _, name := range names {
		if err := do(name); err != nil {
			errs = append(errs, err)
			continue
		}
		a.println(name)
	}
	return errors.Join(errs...)
}

// println writes a line of output.
func (a *app) println(args ...any) {
	fmt.Fprintln(a.cli.Out(), args...) //nolint:errcheck // a closed pipe shows in the exit of its reader
}

// notef writes a line for people, beside the output.
func (a *app) notef(format string, args ...any) {
	fmt.Fprintf(a.cli.Err(), format+"\n", args...) //nolint:errcheck // a note that cannot be shown must not end the act
}

// completeWith registers fixed completions for a flag.
func completeWith(cmd *cobra.Command, flag string, values ...string) {
	err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	if err != nil {
		panic(err) // the flag does not exist: a fault of this package
	}
}

// completeProjectFlag offers projects for the flag --project.
func (a *app) completeProjectFlag(cmd *cobra.Command) {
	if err := cmd.RegisterFlagCompletionFunc("project", a.completeProjects); err != nil {
		panic(err) // the flag does not exist: a fault of this package
	}
}
