package server

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are the server's own; label sets are constant, so that nothing that
// a caller sends can add a series.
type metrics struct {
	registry *prometheus.Registry
	calls    *prometheus.CounterVec
	duration *prometheus.HistogramVec
	plans    prometheus.Histogram
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "depot_calls_total", Help: "Calls answered, by procedure and code.",
		}, []string{"procedure", "code"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "depot_call_duration_seconds", Help: "Time to answer a call; hanging calls take up to 25 s.",
			Buckets: []float64{.001, .005, .025, .1, .5, 2, 10, 30},
		}, []string{"procedure"}),
		plans: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "depot_plan_duration_seconds", Help: "Time to plan a scope and store the plan.",
			Buckets: []float64{.0005, .001, .005, .025, .1, .5, 2},
		}),
	}
	m.registry.MustRegister(m.calls, m.duration, m.plans,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

func (m *metrics) call(procedure, code string, took time.Duration) {
	m.calls.WithLabelValues(procedure, code).Inc()
	m.duration.WithLabelValues(procedure).Observe(took.Seconds())
}

// Planned notes how long the scheduler took for one plan.
func (s *Server) Planned(took time.Duration) { s.metrics.plans.Observe(took.Seconds()) }
