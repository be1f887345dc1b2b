package cloud

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	"github.com/opendepot/depot/agent/provider"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
)

func starts(r *rig, n int) int {
	return look(r.host, func(h *host) int { return h.started[id("mch", n)] })
}

func TestMachinesSurviveTheAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		a := r.launch()
		r.order(run(1, 1), run(2, 2))
		until(t, "both run", func() bool { return r.state(1) == up && r.state(2) == up })
		a.stop()
		r.host.exit(id("mch", 2), provider.Exit{Clean: true})
		r.set(func(s *server) { s.report = nil })
		r.launch()
		until(t, "both are reported", func() bool { return r.state(1) == up && r.state(2) == exited })
		if m := r.machine(id("mch", 2)); m.GetGenerationId() != id("gen", 2) {
			t.Errorf("reported %v", m)
		}
		if starts(r, 1) != 1 || starts(r, 2) != 1 {
			t.Error("a machine was launched twice")
		}
	})
}

// Nothing that ended is ever launched again, by whatever way it went.
func TestNeverLaunchedTwice(t *testing.T) {
	ways := map[string]func(t *testing.T, r *rig){
		"reboot":    func(_ *testing.T, r *rig) { r.host.reboot() },
		"dirty end": func(_ *testing.T, r *rig) { r.host.exit(id("mch", 1), provider.Exit{}) },
		"destroyed, and ordered by an old control plane": func(t *testing.T, r *rig) {
			t.Helper()
			r.order(toDestroy())
			until(t, "it is gone", func() bool { return r.state(1) == unseen })
			r.order(run(1, 1))
		},
		"stopped before it was seen": func(t *testing.T, r *rig) {
			t.Helper()
			r.host.reboot()
			r.order(toStop(1))
			until(t, "it is reported", func() bool { return r.state(1) == exited })
			r.order(run(1, 1))
		},
	}
	for name, end := range ways {
		for restart, when := range map[string]string{"": "", "before": "before", "after": "after"} {
			t.Run(name+" restart "+restart, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := newRig(t)
					a := r.launch()
					r.order(run(1, 1))
					until(t, "the machine runs", func() bool { return r.state(1) == up })
					if when == "before" {
						a.stop()
						r.launch()
						until(t, "it is back", func() bool { return r.state(1) == up })
					}
					end(t, r)
					if when == "after" && a.agent != nil {
						until(t, "it is over", func() bool { return r.state(1) == exited })
						a.stop()
						r.set(func(s *server) { s.report = nil })
						r.launch()
					}
					until(t, "its end is reported", func() bool { return r.state(1) == exited })
					pass(t, time.Hour)
					if starts(r, 1) != 1 {
						t.Errorf("the machine was started %d times", starts(r, 1))
					}
				})
			})
		}
	}
}

// A crash leaves what a crash leaves: the test ends the agent while the act
// hangs, and lets it take effect or not.
func TestCrashInAnAct(t *testing.T) {
	for name, record := range map[string]launchRecord{"before the launch": neverLaunched, "while launching": launching} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				state, err := OpenState(r.dir)
				must(t, err)
				if record != neverLaunched {
					must(t, state.note(id("mch", 1), record))
				}
				must(t, os.WriteFile(filepath.Join(r.dir, ledgerDir, id("mch", 2)+temporarySuffix), []byte("laun"), 0o600))
				must(t, state.Close())
				r.order(run(1, 1))
				r.launch()
				until(t, "the machine runs", func() bool { return r.state(1) == up })
				if starts(r, 1) != 1 {
					t.Errorf("the machine was started %d times", starts(r, 1))
				}
			})
		})
	}
	t.Run("launched but not noted", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			a := r.launch()
			r.order(run(1, 1))
			until(t, "the machine runs", func() bool { return r.state(1) == up })
			a.stop()
			must(t, os.WriteFile(filepath.Join(r.dir, ledgerDir, id("mch", 1)), []byte("launching"), 0o600))
			r.launch()
			until(t, "it is reported", func() bool { return r.state(1) == up })
			pass(t, time.Minute)
			if starts(r, 1) != 1 {
				t.Error("the machine was launched twice")
			}
		})
	})
	for _, act := range []string{"launch", "destroy", "commit"} {
		t.Run("cut in "+act, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				hang := make(chan struct{})
				if act == "launch" {
					r.host.hang[act] = hang
				}
				a := r.launch()
				r.order(run(1, 1))
				if act != "launch" {
					until(t, "the machine runs", func() bool { return r.state(1) == up })
					r.host.set(func(h *host) { h.hang[act] = hang })
					r.host.exit(id("mch", 1), provider.Exit{Clean: act == "commit"})
					if act == "destroy" {
						r.order(toDestroy())
					}
				}
				pass(t, 5*time.Second)
				if s := r.state(1); s == unseen || s == exited && act == "commit" {
					t.Errorf("reported %v while the act runs: its volume would be free", s)
				}
				begun := time.Now()
				a.stop()
				if d := time.Since(begun); d < stopGrace || d > stopGrace+time.Second {
					t.Errorf("the agent gave the act %s", d)
				}
				r.host.set(func(h *host) { clear(h.hang) })
				r.launch()
				want := map[string]depotv1.ObservedMachine_State{"launch": up, "destroy": unseen, "commit": exited}[act]
				until(t, act+" is done", func() bool { return r.state(1) == want })
				if starts(r, 1) != 1 {
					t.Errorf("the machine was started %d times", starts(r, 1))
				}
			})
		})
	}
}

func TestJoin(t *testing.T) {
	t.Run("the answer is lost", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			r.failJoin = connect.NewError(connect.CodeUnavailable, errors.New("cut"))
			r.launch()
			until(t, "it joined", func() bool { return get(r.server, func(s *server) int { return s.syncs }) > 0 })
		})
	})
	t.Run("the agent crashed before it had the answer", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			r.stop()
			a := r.launch()
			pass(t, 10*time.Second)
			a.stop()
			r.start()
			r.launch()
			until(t, "it joined", func() bool { return get(r.server, func(s *server) int { return s.syncs }) > 0 })
		})
	})
	t.Run("the certificate was not stored", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			a := r.launch()
			until(t, "it joined", func() bool { return get(r.server, func(s *server) int { return s.syncs }) > 0 })
			a.stop()
			path := filepath.Join(r.dir, identityFile)
			text, err := os.ReadFile(path) //nolint:gosec // in the test's directory
			must(t, err)
			key, _, _ := strings.Cut(string(text), "-----BEGIN CERTIFICATE")
			must(t, os.WriteFile(path, []byte(key), 0o600)) //nolint:gosec // in the test's directory
			r.launch()
			until(t, "it joined with the same key", func() bool { return get(r.server, func(s *server) int { return s.joins }) == 2 })
		})
	})
	t.Run("without the token once it has joined", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			a := r.launch()
			until(t, "it joined", func() bool { return get(r.server, func(s *server) int { return s.syncs }) > 0 })
			a.stop()
			r.token = client.Token{}
			r.set(func(s *server) { s.syncs = 0 })
			r.launch()
			until(t, "it is back", func() bool { return get(r.server, func(s *server) int { return s.syncs }) > 0 })
			if get(r.server, func(s *server) int { return s.joins }) != 1 {
				t.Error("it joined again")
			}
		})
	})
}

// ends runs the agent and returns the error that it refuses to start with.
func (r *rig) ends() error {
	r.t.Helper()
	state, err := OpenState(r.dir)
	must(r.t, err)
	defer state.Close() //nolint:errcheck // the test is about another error
	agent, err := New(r.config(state))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	return agent.Run(ctx)
}

func TestRefusals(t *testing.T) {
	tests := map[string]struct {
		change func(t *testing.T, r *rig)
		want   string
	}{
		"no token":                             {func(_ *testing.T, r *rig) { r.token = client.Token{} }, "has not joined a control plane yet"},
		"unknown token":                        {func(_ *testing.T, r *rig) { r.server.token += "x" }, "the token is not known"},
		"token that was used with another key": {func(_ *testing.T, r *rig) { r.joined = []byte("other") }, "with another key"},
		"foreign server": {func(t *testing.T, r *rig) {
			t.Helper()
			r.joinAndStop(t)
			r.set(func(s *server) { s.id = "srv_0192aaaaaaaa70008000000000009999" })
		}, "belongs to srv_0192aaaaaaaa70008000000000000001"},
		"lower epoch": {func(t *testing.T, r *rig) {
			t.Helper()
			r.set(func(s *server) { s.epoch = 7 })
			r.joinAndStop(t)
			r.set(func(s *server) { s.epoch = 6 })
		}, "is in its epoch 6, but this agent has obeyed epoch 7"},
		"another server's token": {func(t *testing.T, r *rig) {
			t.Helper()
			r.joinAndStop(t)
			token, err := client.ParseToken("depot_agent_" + strings.Repeat("0", 32) + "_" + strings.Repeat("a", 104))
			must(t, err)
			r.token = token
		}, "belongs to another control plane"},
		"a project's token": {func(t *testing.T, r *rig) {
			t.Helper()
			token, err := client.ParseToken(strings.Replace(r.server.token, "agent", "project", 1))
			must(t, err)
			r.token = token
		}, "is one for a project"},
		"expired without a token": {func(t *testing.T, r *rig) {
			t.Helper()
			r.joinAndStop(t)
			r.token = client.Token{}
			pass(t, 25*time.Hour)
		}, "docker depot agent token"},
		"damaged state": {func(t *testing.T, r *rig) {
			t.Helper()
			must(t, os.Mkdir(r.dir, 0o700))
			must(t, os.WriteFile(filepath.Join(r.dir, controlPlaneFile), []byte("{"), 0o600))
		}, "is damaged"},
		"damaged ledger": {func(t *testing.T, r *rig) {
			t.Helper()
			r.joinAndStop(t)
			must(t, os.WriteFile(filepath.Join(r.dir, ledgerDir, id("mch", 1)), []byte("?"), 0o600))
		}, `it says "?"`},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				test.change(t, r)
				r.order(run(1, 1))
				err := r.ends()
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("the agent ended with %v", err)
				}
				if starts(r, 1) != 0 {
					t.Error("it launched a machine")
				}
			})
		})
	}
}

// joinAndStop leaves the state of an agent that has joined.
func (r *rig) joinAndStop(t *testing.T) {
	t.Helper()
	a := r.launch()
	until(t, "it joined", func() bool { return a.agent.Status().Connected })
	a.stop()
}

// Once at work, an agent outlasts a foreign or restored control plane: it obeys
// nothing, keeps its machines, and goes on when the right one is back.
func TestRefusesToObeyAtWork(t *testing.T) {
	for name, test := range map[string]struct{ wrong, right func(*server) }{
		"foreign":     {func(s *server) { s.id = "srv_0192aaaaaaaa70008000000000009999" }, func(s *server) { s.id = serverID }},
		"lower epoch": {func(s *server) { s.epoch = 0 }, func(s *server) { s.epoch = 2 }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.launch()
				r.order(run(1, 1))
				until(t, "the machine runs", func() bool { return r.state(1) == up })
				r.set(test.wrong)
				r.order(toDestroy(), run(2, 2))
				pass(t, time.Hour)
				if r.state(1) != up || starts(r, 2) != 0 {
					t.Error("it obeyed")
				}
				r.set(test.right)
				until(t, "the right one is obeyed", func() bool { return r.state(1) == unseen && r.state(2) == up })
			})
		})
	}
}

func TestControlPlaneAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		a := r.launch()
		r.order(run(1, 1))
		until(t, "the machine runs", func() bool { return r.state(1) == up })
		r.stop()
		pass(t, 10*time.Minute)
		if a.agent.Status().Connected {
			t.Error("it says that it is connected")
		}
		r.host.exit(id("mch", 1), provider.Exit{Clean: true})
		pass(t, 10*time.Second)
		if acts := look(r.host, func(h *host) string { return strings.Join(h.acts, " ") }); acts != "launch commit" {
			t.Errorf("done: %s", acts)
		}
		r.set(func(s *server) { s.epoch++ })
		r.start()
		pass(t, 6*time.Second)
		if r.state(1) != exited {
			t.Error("it is not back within 6 s")
		}
		until(t, "it is answered", func() bool { return a.agent.Status().Connected })
	})
}

func TestAnotherSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		a := r.launch()
		r.order(run(1, 1))
		until(t, "the machine runs", func() bool { return r.state(1) == up })
		first := get(r.server, func(s *server) string { return s.report.GetSessionId() })
		r.set(func(s *server) {
			s.fail = connect.NewError(connect.CodeAlreadyExists, errors.New("another session is connected"))
		})
		pass(t, time.Minute)
		a.stop()
		r.set(func(s *server) { s.fail = nil })
		r.launch()
		until(t, "the other agent is connected", func() bool { return get(r.server, func(s *server) string { return s.report.GetSessionId() }) != first })
	})
}

func TestRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		a := r.launch()
		until(t, "it is connected", func() bool { return a.agent.Status().Connected })
		serial := func() string { return get(r.server, func(s *server) string { return s.leaf.SerialNumber.String() }) }
		first := serial()
		pass(t, 11*time.Hour)
		if get(r.server, func(s *server) int { return s.renewals }) != 0 {
			t.Error("it renewed too early")
		}
		pass(t, 2*time.Hour)
		if n := get(r.server, func(s *server) int { return s.renewals }); n != 1 || serial() == first {
			t.Errorf("%d renewals at half-life; the new one is in use: %v", n, serial() != first)
		}
		a.stop()
		second := serial()
		r.launch()
		until(t, "it shows the renewed one after a restart", func() bool { return serial() == second })
	})
}

func TestOneAgentPerDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	first, err := OpenState(dir)
	must(t, err)
	if _, err := OpenState(dir); err == nil || !strings.Contains(err.Error(), "another agent uses the state directory "+dir) {
		t.Errorf("the second was answered %v", err)
	}
	must(t, first.Close())
	second, err := OpenState(dir)
	must(t, err)
	must(t, second.Close())
	must(t, os.Chmod(dir, 0o755)) //nolint:gosec // that is the test
	if _, err := OpenState(dir); err == nil || !strings.Contains(err.Error(), "open to other users") {
		t.Errorf("an open directory was answered %v", err)
	}
}
