// Command bench measures depot's speed and size, next to what each figure is
// compared with in the same run, as machines are noisy and only ratios last.
// It prints a table for people and, with -json, a file for programs. It needs
// root, and DEPOT_BIN as the end-to-end tests do: run it with `make bench`.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
)

// figure is one row of bench.json.
type figure struct {
	Name string `json:"name"`
	// Value and Baseline are medians (or what Unit says) of the series, in Unit.
	Value    float64 `json:"value"`
	Unit     string  `json:"unit"`
	Baseline float64 `json:"baseline,omitempty"`
	// Ratio is Value / Baseline, or its inverse for rates; Bound is what it, or
	// Value where there is no baseline, should stay under (over, for rates).
	Ratio float64 `json:"ratio,omitempty"`
	Bound float64 `json:"bound"`
	Runs  int     `json:"runs"`
	// The raw series, and how the baseline was taken.
	Series          []float64 `json:"series"`
	BaselineSeries  []float64 `json:"baseline_series,omitempty"`
	BaselineCommand string    `json:"baseline_command,omitempty"`
	// Dominated says what most of the time or space goes into.
	Dominated string `json:"dominated_by"`
	// atLeast says that Bound is a lower one.
	atLeast bool
}

func (f figure) ok() bool {
	v := f.Ratio
	if f.Baseline == 0 {
		v = f.Value
	}
	if f.atLeast {
		return v >= f.Bound
	}
	return v <= f.Bound
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := bench(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func bench(ctx context.Context, args []string, out io.Writer) (err error) {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	path := flags.String("json", "", "write the figures to this file")
	only := flags.String("only", "", "measure only the figures whose names contain this")
	runs := flags.Int("runs", 15, "how often each is measured")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var figures []figure
	for _, m := range measurements() {
		if !slices.ContainsFunc(m.names, func(n string) bool { return strings.Contains(n, *only) }) {
			continue
		}
		got, err := inSite(ctx, func(tb *tb) []figure { return m.run(tb, *runs) })
		if err != nil {
			return err
		}
		figures = append(figures, got...)
	}
	if err := table(out, figures); err != nil {
		return err
	}
	if *path == "" {
		return nil
	}
	b, err := json.MarshalIndent(figures, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(*path, append(b, '\n'), 0o644) //nolint:gosec // figures are no secret
}

func table(out io.Writer, figures []figure) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "FIGURE\tVALUE\tBASELINE\tRATIO\tBOUND\t\tDOMINATED BY") //nolint:errcheck // Flush tells
	for _, f := range figures {
		verdict, sign, baseline, ratio := "ok", "≤", "-", "-"
		if !f.ok() {
			verdict = "MISSED"
		}
		if f.atLeast {
			sign = "≥"
		}
		if f.Baseline != 0 {
			baseline, ratio = fmt.Sprintf("%.4g %s", f.Baseline, f.Unit), fmt.Sprintf("%.2f", f.Ratio)
		}
		fmt.Fprintf(w, "%s\t%.4g %s\t%s\t%s\t%s %g\t%s\t%s\n", f.Name, f.Value, f.Unit, baseline, ratio, sign, f.Bound, verdict, f.Dominated) //nolint:errcheck // Flush tells
	}
	return w.Flush()
}

// tb lets a measurement use package site as a test does.
type tb struct {
	ctx      context.Context //nolint:containedctx // as testing.T has it
	log      io.Writer
	cleanups []func()
	failed   []error
}

// stopped is what Fatalf panics with.
type stopped struct{}

func inSite(ctx context.Context, fn func(*tb) []figure) (figures []figure, err error) {
	t := &tb{ctx: ctx, log: os.Stderr}
	defer func() {
		for _, clean := range slices.Backward(t.cleanups) {
			t.protect(clean)
		}
		err = errors.Join(t.failed...)
	}()
	t.protect(func() { figures = fn(t) })
	return figures, nil
}

// protect runs fn and lets a Fatalf in it end it alone.
func (t *tb) protect(fn func()) {
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(stopped); !ok {
				panic(r)
			}
		}
	}()
	fn()
}

func (t *tb) Helper()                         {}
func (t *tb) Logf(format string, args ...any) { fmt.Fprintf(t.log, format+"\n", args...) } //nolint:errcheck // a log
func (t *tb) Errorf(format string, args ...any) {
	t.failed = append(t.failed, fmt.Errorf(format, args...))
}
func (t *tb) Failed() bool             { return len(t.failed) > 0 }
func (t *tb) Cleanup(fn func())        { t.cleanups = append(t.cleanups, fn) }
func (t *tb) Context() context.Context { return t.ctx }

func (t *tb) Fatalf(format string, args ...any) {
	t.Errorf(format, args...)
	panic(stopped{})
}

// TempDir makes a directory that goes with the measurement.
func (t *tb) TempDir() string {
	dir, err := os.MkdirTemp("", "depot-bench-")
	if err != nil {
		t.Fatalf("make a directory: %v", err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("%v", err)
		}
	})
	return dir
}

// median returns the middle of the series.
func median(series []float64) float64 { return quantile(series, 0.5) }

// quantile returns the value under which the share q of the series lies.
func quantile(series []float64, q float64) float64 {
	s := slices.Sorted(slices.Values(series))
	return s[min(len(s)-1, int(q*float64(len(s))))]
}
