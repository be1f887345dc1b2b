package server

import (
	"bytes"
	"cmp"
	"context"
	"time"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// agentService answers cloud agents.
type agentService struct{ s *Server }

// Join binds an agent token to the first key that comes with it, and returns
// the agent's identity.
func (a *agentService) Join(ctx context.Context, req *depotv1.JoinRequest) (*depotv1.JoinResponse, error) {
	s := a.s
	token, err := s.Authenticator.AgentToken(ctx, req.GetToken(), s.Now())
	if err != nil {
		return nil, err
	}
	key, err := s.Authority.KeyHash(req.GetCsr())
	if err != nil {
		return nil, err
	}
	var agent controlplane.Agent
	err = s.Store.Update(ctx, func(tx controlplane.Tx) (err error) {
		if token, err = tx.Token(ctx, token.ID); err != nil {
			return err
		}
		if token.UsedKey != nil {
			if !bytes.Equal(token.UsedKey, key) {
				return controlplane.Errorf(controlplane.Denied, "agent token %q was used before, by another host: make a new one with `docker depot agent token`", token.Name)
			}
			agent, err = agentOfToken(ctx, tx, token)
			return err
		}
		token.UsedKey, token.Used = key, s.Now()
		if err := tx.PutToken(ctx, token); err != nil {
			return err
		}
		if agent, err = s.joining(ctx, tx, key); err != nil {
			return err
		}
		agent.Token, agent.Name = token.ID, cmp.Or(controlplane.Words(req.GetName()), agent.Name, token.Name)
		return tx.PutAgent(ctx, agent)
	})
	if err != nil {
		return nil, err
	}
	identity, err := s.signIdentity(ctx, controlplane.PrincipalAgent, agent.ID, req.GetCsr())
	if err != nil {
		return nil, err
	}
	s.Log.InfoContext(ctx, "agent joined", "agent", agent.ID, "name", agent.Name)
	return &depotv1.JoinResponse{AgentId: agent.ID, Identity: identity, ServerId: s.Record.ID}, nil
}

// joining returns the agent that a new token's key makes: the one that has the
// key already, whose certificate ran out while it was off, or a new one.
func (s *Server) joining(ctx context.Context, tx controlplane.Tx, key []byte) (controlplane.Agent, error) {
	agents, err := tx.Agents(ctx)
	if err != nil {
		return controlplane.Agent{}, err
	}
	for _, a := range agents {
		if bytes.Equal(a.Key, key) {
			return a, nil
		}
	}
	return controlplane.Agent{ID: s.newID(controlplane.KindAgent), Key: key, Created: s.Now()}, nil
}

func agentOfToken(ctx context.Context, tx controlplane.Tx, t controlplane.Token) (controlplane.Agent, error) {
	agents, err := tx.Agents(ctx)
	if err != nil {
		return controlplane.Agent{}, err
	}
	for _, a := range agents {
		if a.Token == t.ID {
			return a, nil
		}
	}
	return controlplane.Agent{}, controlplane.Errorf(controlplane.Denied, "the agent of token %q was removed: make a new token with `docker depot agent token`", t.Name)
}

// RenewIdentity signs a new identity for an agent that is known.
func (a *agentService) RenewIdentity(ctx context.Context, req *depotv1.RenewIdentityRequest) (*depotv1.RenewIdentityResponse, error) {
	s := a.s
	key, err := s.Authority.KeyHash(req.GetCsr())
	if err != nil {
		return nil, err
	}
	id := caller(ctx).ID
	err = s.Store.Update(ctx, func(tx controlplane.Tx) error {
		agent, err := tx.Agent(ctx, id)
		if err != nil {
			return removedAgent(id, err)
		}
		agent.Key = key
		return tx.PutAgent(ctx, agent)
	})
	if err != nil {
		return nil, err
	}
	identity, err := s.signIdentity(ctx, controlplane.PrincipalAgent, id, req.GetCsr())
	if err != nil {
		return nil, err
	}
	return &depotv1.RenewIdentityResponse{Identity: identity}, nil
}

func removedAgent(id string, err error) error {
	if controlplane.CodeOf(err) == controlplane.NotFound {
		return controlplane.Errorf(controlplane.Denied, "agent %s was removed from this control plane: join again with a new token and an empty state directory", id)
	}
	return err
}

// SyncAgent stores a report and hangs until the orders are not those that the
// agent has.
func (a *agentService) SyncAgent(ctx context.Context, req *depotv1.SyncAgentRequest) (*depotv1.SyncAgentResponse, error) {
	s := a.s
	id := caller(ctx).ID
	if err := s.sameServer(ctx, id, req); err != nil {
		return nil, err
	}
	if !s.sessions.enter(id, req.GetSessionId(), s.Now()) {
		return nil, controlplane.Errorf(controlplane.Exists, "agent %s is connected from another process: stop one of the two, or join the second with a token of its own", id)
	}
	defer func() { s.sessions.leave(id, req.GetSessionId(), s.Now()) }()

	watcher := s.Store.Watch(controlplane.TopicAgent, id)
	defer watcher.Close()
	err := s.Store.Update(ctx, func(tx controlplane.Tx) error {
		// Here, as transactions have an order and calls have none.
		if !s.sessions.last(id, req.GetSessionId(), req.GetSequence()) {
			return controlplane.Errorf(controlplane.Unavailable, "agent %s has sent a later report than number %d: this one is not heard", id, req.GetSequence())
		}
		return s.noteObservation(ctx, tx, id, req)
	})
	if err != nil {
		return nil, removedAgent(id, err)
	}
	timeout := time.NewTimer(s.Times.Hang)
	defer timeout.Stop()
	for {
		orders, err := s.orders(ctx, id, req)
		if err != nil {
			return nil, removedAgent(id, err)
		}
		if orders.GetRevision() != req.GetHaveRevision() || !hang(ctx, watcher, timeout.C) {
			return orders, nil
		}
	}
}

// sameServer refuses an agent that belongs to another control plane, or that
// knows a later state of this one.
func (s *Server) sameServer(ctx context.Context, agent string, req *depotv1.SyncAgentRequest) error {
	if id := req.GetServerId(); id != "" && id != s.Record.ID {
		return controlplane.Errorf(controlplane.Precondition, "agent %s belongs to control plane %s, and this is %s: give the agent the other's URL, or join it here with a new token and an empty state directory", agent, id, s.Record.ID)
	}
	if seen := req.GetEpoch(); seen > uint64(s.Record.Epoch) {
		s.ahead.Store(max(s.ahead.Load(), seen))
		s.Log.ErrorContext(ctx, "agent knows a later state of this control plane", "agent", agent, "epoch", s.Record.Epoch, "seen", seen)
		return restoredError(seen, s.Record.Epoch)
	}
	return nil
}

func restoredError(seen uint64, epoch uint32) error {
	return controlplane.Errorf(controlplane.Precondition, "this control plane is at epoch %d, and its agents have seen epoch %d: its store was restored from a backup, or another one runs; stop the other, then run `depot-controlplane recover --epoch %d` and start again", epoch, seen, seen)
}

// disconnectAgent notes that an agent is silent. Nothing of its machines
// changes (builds-survive): only who waits for it is told.
func (s *Server) disconnectAgent(ctx context.Context, id string) error {
	return s.Store.Update(ctx, func(tx controlplane.Tx) error {
		agent, err := tx.Agent(ctx, id)
		if controlplane.CodeOf(err) == controlplane.NotFound {
			return nil
		}
		if err != nil || s.sessions.connected(id, s.Now(), s.Times.AgentSilent) {
			return err
		}
		s.Log.WarnContext(ctx, "agent silent", "agent", id, "name", agent.Name, "seen", agent.Seen)
		agent.Connected = false
		machines, err := tx.AgentMachines(ctx, id)
		if err != nil {
			return err
		}
		announceMachines(tx, machines)
		return tx.PutAgent(ctx, agent)
	})
}

// announceMachines has the scopes of an agent's machines planned again.
func announceMachines(tx controlplane.Tx, machines []controlplane.Machine) {
	for _, m := range machines {
		tx.Announce(controlplane.TopicScope, controlplane.Scope{Project: m.Project, Arch: m.Arch}.String())
	}
}
