// Command standin is what the tests of package local put in the place of
// depot-agent: it keeps to the same contract as a machine's PID 1 and, unlike
// the real one, needs no control plane. The same program is the payload of RUN
// steps and the client that has them built.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/tonistiigi/fsutil"
	"golang.org/x/sync/errgroup"
)

func init() { runtime.LockOSThread() } // so that headless has the first thread

func main() {
	acts := map[string]func([]string) error{"machine": machine, "probe": probe, "hold": hold, "solve": solve, "headless": headless}
	if len(os.Args) < 2 || acts[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: standin machine|probe|hold|solve|headless")
		os.Exit(2)
	}
	if err := acts[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// headless ends the process's first thread and lives on until its input ends.
func headless([]string) error {
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	syscall.RawSyscall(syscall.SYS_EXIT, 0, 0, 0)
	return nil
}

const depot = "/run/depot"

// machine answers "hello" at the door, runs buildkitd if it finds a
// configuration for it, and on TERM ends as a machine agent does.
func machine([]string) error {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	door, err := net.FileListener(os.NewFile(3, "door"))
	if err != nil {
		return err
	}
	if _, err := os.NewFile(4, "lock").Stat(); err != nil {
		return fmt.Errorf("the volume's lock: %w", err)
	}
	go func() {
		for {
			c, err := door.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(c, "hello")
			c.Close()
		}
	}()
	inside, err := net.Listen("tcp", ":7001") // what another machine must not reach
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := inside.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(c, "inside")
			c.Close()
		}
	}()
	var daemon *exec.Cmd
	if _, err := os.Stat(depot + "/buildkitd.toml"); err == nil {
		daemon = exec.Command("buildkitd", "--config", depot+"/buildkitd.toml", "--addr", "unix://"+depot+"/state/buildkitd.sock")
		daemon.Stdout, daemon.Stderr = os.Stdout, os.Stderr
		if err := daemon.Start(); err != nil {
			return err
		}
	}
	if err := os.WriteFile("/var/lib/buildkit/started", nil, 0o600); err != nil {
		return err
	}
	<-stop
	if daemon != nil {
		if err := daemon.Process.Signal(syscall.SIGTERM); err != nil {
			return err
		}
		if err := daemon.Wait(); err != nil {
			fmt.Fprintln(os.Stderr, "buildkitd:", err) // its exit code is 1 after TERM, always
		}
	}
	tmp := depot + "/state/.exit.json"
	if err := os.WriteFile(tmp, []byte(`{"clean":true}`), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, depot+"/state/exit.json")
}

// probe tries each "network address" pair and prints which of them answered.
func probe(args []string) error {
	answered := map[string]bool{}
	var mu sync.Mutex
	var g sync.WaitGroup
	for i := 0; i+1 < len(args); i += 2 {
		g.Go(func() {
			ok := answers(args[i], args[i+1])
			mu.Lock()
			defer mu.Unlock()
			answered[args[i]+" "+args[i+1]] = ok
		})
	}
	g.Wait()
	return json.NewEncoder(os.Stdout).Encode(answered)
}

func answers(network, address string) bool {
	c, err := net.DialTimeout(network, address, 2*time.Second)
	if err != nil {
		return false
	}
	defer c.Close()
	if _, err := c.Write([]byte("?")); err != nil {
		return false
	}
	if err := c.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return false
	}
	n, err := c.Read(make([]byte, 16))
	return err == nil && n > 0
}

// hold listens on a port, and ends once both of two such steps were seen to
// hold it at the same time: they meet in a directory that they share.
func hold(args []string) error {
	address, own, other := args[0], args[1], args[2]
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := os.WriteFile(own, nil, 0o600); err != nil {
		return err
	}
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(other); err == nil {
			return nil
		}
	}
	return errors.New("the other step never listened")
}

// solve waits for the daemon at a socket, has it run two steps at once that
// hold the same port, and one that probes, whose answer it prints.
func solve(args []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := client.New(ctx, "unix://"+args[0])
	if err != nil {
		return err
	}
	defer c.Close()
	for {
		if _, err = c.ListWorkers(ctx); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("buildkitd does not answer: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := fsutil.NewFS(filepath.Dir(self))
	if err != nil {
		return err
	}
	base := llb.Scratch().File(llb.Copy(llb.Local("context", llb.IncludePatterns([]string{filepath.Base(self)})), filepath.Base(self), "/standin"))
	var g errgroup.Group
	shared := llb.AddMount("/shared", llb.Scratch(), llb.AsPersistentCacheDir("shared", llb.CacheMountShared))
	for _, names := range [][2]string{{"a", "b"}, {"b", "a"}} {
		g.Go(func() error {
			run := base.Run(llb.Args([]string{"/standin", "hold", ":5432", "/shared/" + names[0], "/shared/" + names[1]}), shared, llb.IgnoreCache)
			return build(ctx, c, dir, run.Root(), nil)
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	run := base.Run(llb.Args(append([]string{"/standin", "probe"}, args[1:]...)), llb.IgnoreCache)
	return build(ctx, c, dir, run.Root(), os.Stdout)
}

func build(ctx context.Context, c *client.Client, dir fsutil.FS, state llb.State, stdout *os.File) error {
	def, err := state.Marshal(ctx)
	if err != nil {
		return err
	}
	status := make(chan *client.SolveStatus)
	var g errgroup.Group
	g.Go(func() error {
		_, err := c.Solve(ctx, def, client.SolveOpt{LocalMounts: map[string]fsutil.FS{"context": dir}}, status)
		return err
	})
	g.Go(func() error {
		for s := range status {
			for _, l := range s.Logs {
				out := os.Stderr
				if l.Stream == 1 && stdout != nil {
					out = stdout
				}
				if _, err := out.Write(l.Data); err != nil {
					return err
				}
			}
		}
		return nil
	})
	return g.Wait()
}
