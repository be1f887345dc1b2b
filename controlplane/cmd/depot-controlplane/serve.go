package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/opendepot/depot/controlplane"
	"github.com/opendepot/depot/controlplane/auth"
	"github.com/opendepot/depot/controlplane/ca"
	"github.com/opendepot/depot/controlplane/scheduler"
	"github.com/opendepot/depot/controlplane/server"
	"github.com/opendepot/depot/controlplane/store"
	"github.com/opendepot/depot/internal/mtls"
)

func newServeCommand(lookup func(string) (string, bool)) *cobra.Command {
	var c config
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the control plane",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := environment(cmd.Flags(), lookup); err != nil {
				return err
			}
			if err := c.complete(); err != nil {
				return err
			}
			times, err := c.times()
			if err != nil {
				return err
			}
			log, err := c.logger()
			if err != nil {
				return err
			}
			return serve(cmd.Context(), &c, times, log)
		},
	}
	c.flags(cmd.Flags())
	return cmd
}

// serve wires the control plane and runs it until ctx ends.
func serve(ctx context.Context, c *config, times controlplane.Times, log *slog.Logger) error {
	started := time.Now()
	// Differences to started are measured on the monotonic clock, so a jump of
	// the wall clock moves no deadline.
	now := func() time.Time { return started.Add(time.Since(started)).UTC() }

	masterKey, err := ca.LoadMasterKey(c.MasterKeyFile, c.DataDir)
	if err != nil {
		return fmt.Errorf("--master-key-file: %w", err)
	}
	authority, err := ca.New(masterKey)
	if err != nil {
		return err
	}
	st, err := openStore(ctx, c, store.Config{Logger: log})
	if err != nil {
		return err
	}
	defer func() {
		if err := st.Close(); err != nil {
			log.Error("close the store", "err", err)
		}
	}()
	record, first, err := begin(ctx, st, authority, c.Organization, now())
	if err != nil {
		return err
	}
	joinKey, err := authority.Open(record.ID, record.JoinKey)
	if err != nil {
		return fmt.Errorf("open the join key: is %s the master key of this data directory? %w", c.MasterKeyFile, err)
	}
	pin, err := pinOf(record)
	if err != nil {
		return err
	}
	authenticator, err := auth.New(auth.Config{Store: st, Pin: pin, Random: rand.Reader, Logger: log})
	if err != nil {
		return err
	}
	if first {
		if err := os.Remove(c.AdminTokenFile); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove an older administrator's token: %w", err)
		}
	}
	if err := writeAdminToken(ctx, st, authenticator, c.AdminTokenFile, now()); err != nil {
		return err
	}
	s := server.New(server.Config{
		Store: st, Authority: authority, Authenticator: authenticator,
		Times: times, Sizes: controlplane.DefaultSizes(),
		Now: now, Record: record, JoinKey: joinKey, Version: version, Log: log,
	})
	sched := &scheduler.Scheduler{
		Store: st, Times: s.Times, Sizes: s.Sizes, Started: now(), Now: now, Log: log, Planned: s.Planned,
	}
	doors, err := c.open(ctx, authority, record, now)
	if err != nil {
		return err
	}
	log.InfoContext(ctx, "control plane ready", "server", record.ID, "epoch", record.Epoch, "version", version,
		"clients", doors.clients.Addr().String(), "agents", doors.agents.Addr().String(), "ops", doors.ops.Addr().String(), "pin", pin)

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return sched.Run(ctx) })
	g.Go(func() error { return s.Run(ctx) })
	g.Go(func() error { return prune(ctx, log, st, times.KeepEnded, now) })
	g.Go(func() error { return keepFresh(ctx, log, doors.certificates...) })
	g.Go(func() error { return serveHTTP(ctx, doors.clients, s.Clients(), log) })
	g.Go(func() error { return serveHTTP(ctx, doors.agents, s.Agents(), log) })
	g.Go(func() error { return serveHTTP(ctx, doors.ops, s.Ops(), log) })
	err = g.Wait()
	log.Info("control plane stopped")
	return err
}

// pruneEvery is how often old records are deleted.
const pruneEvery = time.Hour

// prune deletes what ended long ago, now and then, until ctx ends: the database
// grows with what is built in that time, not for ever.
func prune(ctx context.Context, log *slog.Logger, st *store.Store, keep time.Duration, now func() time.Time) error {
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	for {
		n, err := st.Prune(ctx, now().Add(-keep))
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			log.ErrorContext(ctx, "delete old records", "err", err)
		case n > 0:
			log.InfoContext(ctx, "deleted old records", "records", n)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// doors are the three listeners, and the certificates that two of them show.
type doors struct {
	clients, agents, ops net.Listener
	certificates         []certificate
}

func (c *config) open(ctx context.Context, authority *ca.Authority, record controlplane.Server, now func() time.Time) (doors, error) {
	own, err := ownCertificate(ctx, authority, record, c.Names, now)
	if err != nil {
		return doors{}, err
	}
	d := doors{certificates: []certificate{own}}
	forClients := own
	if c.TLSCert != "" {
		if forClients, err = fileCertificate(c.TLSCert, c.TLSKey); err != nil {
			return doors{}, err
		}
		d.certificates = append(d.certificates, forClients)
	}
	agents, err := mtls.NewAnchors([][]byte{record.Agents.Certificate})
	if err != nil {
		return doors{}, fmt.Errorf("read the agents' authority: %w", err)
	}
	protocols := []string{"h2", "http/1.1"}
	if d.clients, err = listen(ctx, "client-listen", c.ClientListen); err != nil {
		return doors{}, err
	}
	d.clients = tls.NewListener(d.clients, mtls.Server{Identity: forClients.identity, NextProtos: protocols}.Config())
	if d.agents, err = listen(ctx, "agent-listen", c.AgentListen); err != nil {
		return doors{}, err
	}
	d.agents = tls.NewListener(d.agents, mtls.Server{
		Identity: own.identity, Anchors: agents, Optional: true, NextProtos: protocols, Time: now,
	}.Config())
	d.ops, err = listen(ctx, "ops-listen", c.OpsListen)
	return d, err
}

func listen(ctx context.Context, flag, addr string) (net.Listener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for --%s: %w", flag, err)
	}
	return l, nil
}

// graceful is how long calls in progress may take at shutdown; hanging calls
// end at once.
const graceful = 5 * time.Second

// serveHTTP serves until ctx ends, and lets calls in progress end.
func serveHTTP(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	hs := &http.Server{
		Handler:           h,
		Protocols:         protocols,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	done := make(chan error, 1)
	go func() { done <- hs.Serve(l) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), graceful)
	defer cancel()
	if err := hs.Shutdown(stop); err != nil {
		_ = hs.Close()
	}
	<-done
	return nil
}
