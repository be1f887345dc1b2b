package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/opendepot/depot/agent/cloud"
)

// readyFor is how long an agent stays ready without an answer: a hanging call
// is answered within 25 s.
const readyFor = time.Minute

// listenHealth listens on a loopback address; without one, nowhere.
func listenHealth(ctx context.Context, address string) (net.Listener, error) {
	if address == "" {
		return &nowhere{done: make(chan struct{})}, nil
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("--health-address %s: %w; give another, or nothing", address, err)
	}
	return l, nil
}

// nowhere is a listener that nobody reaches.
type nowhere struct {
	done chan struct{}
	once sync.Once
}

// Accept waits for Close.
func (n *nowhere) Accept() (net.Conn, error) {
	<-n.done
	return nil, net.ErrClosed
}

// Close ends Accept.
func (n *nowhere) Close() error {
	n.once.Do(func() { close(n.done) })
	return nil
}

// Addr is nobody's.
func (*nowhere) Addr() net.Addr { return &net.TCPAddr{} }

// serveHealth serves /healthz, /readyz and /metrics until ctx ends.
func serveHealth(ctx context.Context, l net.Listener, status func() cloud.Status, version string) error {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		newMetrics(status, version))
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok") //nolint:errcheck // the caller is gone
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		s := status()
		if time.Since(s.Synced) > readyFor {
			http.Error(w, "the control plane has not answered within "+readyFor.String()+"; machines run on", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok") //nolint:errcheck // the caller is gone
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	stop := context.AfterFunc(ctx, func() { server.Close() }) //nolint:errcheck,gosec // ends Serve
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve health: %w", err)
	}
	return nil
}

// metrics turns a Status into metrics when it is asked to.
type metrics struct {
	status  func() cloud.Status
	version string

	info, connected, synced, machines, volumes, acts, failures *prometheus.Desc
}

func newMetrics(status func() cloud.Status, version string) *metrics {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("depot_agent_"+name, help, labels, nil)
	}
	return &metrics{
		status: status, version: version,
		info:      desc("info", "The agent's version and the control plane that it serves.", "version", "server"),
		connected: desc("connected", "1 if the last call to the control plane was answered."),
		synced:    desc("synced_timestamp_seconds", "When the control plane answered last."),
		machines:  desc("machines", "Machines on this host, by state.", "state"),
		volumes:   desc("volumes", "Volumes on this host."),
		acts:      desc("acts_total", "What was done to machines and volumes.", "act"),
		failures:  desc("act_failures_total", "What was tried in vain on machines and volumes.", "act"),
	}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(out chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, out) }

// Collect implements prometheus.Collector.
func (m *metrics) Collect(out chan<- prometheus.Metric) {
	s := m.status()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(m.info, 1, m.version, s.ServerID)
	connected := 0.0
	if s.Connected {
		connected = 1
	}
	gauge(m.connected, connected)
	if !s.Synced.IsZero() {
		gauge(m.synced, float64(s.Synced.Unix()))
	}
	for _, state := range []string{"pending", "running", "exited"} {
		gauge(m.machines, float64(s.Machines[state]), state)
	}
	gauge(m.volumes, float64(s.Volumes))
	for act, n := range s.Acts {
		out <- prometheus.MustNewConstMetric(m.acts, prometheus.CounterValue, float64(n), act)
	}
	for act, n := range s.Failures {
		out <- prometheus.MustNewConstMetric(m.failures, prometheus.CounterValue, float64(n), act)
	}
}
