package cloud

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/agent/provider"
)

// The names in a state directory.
const (
	lockFile         = "lock"
	identityFile     = "identity.pem"
	controlPlaneFile = "controlplane.json"
	ledgerDir        = "machines"
	temporarySuffix  = ".tmp"
)

// ledgerKeep is how long the end of a machine is remembered. A control plane
// that was restored from an older backup may order it anew within that time
// without effect.
const ledgerKeep = 30 * 24 * time.Hour

// State is the directory of what an agent must not forget: its identity, whom
// it obeys, and which machines it has launched. It is locked as long as it is
// open, so that two agents never share it.
type State struct {
	dir  string
	lock *os.File
}

// controlPlane is whom the agent obeys.
type controlPlane struct {
	// ServerID is the control plane's id; empty before the agent has joined.
	ServerID string `json:"server_id"`
	// Epoch is the highest seen.
	Epoch uint64 `json:"epoch"`
	// AgentID is the id that the control plane gave this agent.
	AgentID string `json:"agent_id"`
	// Pin is that of the token the agent joined with, which is not needed later.
	Pin string `json:"pin,omitempty"`
}

// launchRecord is what the ledger knows of a machine.
type launchRecord string

const (
	neverLaunched launchRecord = ""
	launching     launchRecord = "launching" // a launch was begun; it may be tried again
	launched      launchRecord = "launched"  // a launch succeeded; there will be no other
	// stopping is a machine that was told to end. It is told once: to be told
	// twice means not to wait for its builds.
	stopping launchRecord = "stopping"
	ended    launchRecord = "ended" // it is over; there will be no launch
)

// OpenState opens the directory, making it (mode 0700) where there is none. It
// is an error if another agent has it open.
func OpenState(dir string) (*State, error) {
	if err := os.MkdirAll(filepath.Join(dir, ledgerDir), 0o700); err != nil {
		return nil, fmt.Errorf("make the agent's state directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("open the agent's state directory: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("the agent's state directory %s is open to other users (mode %04o): it holds a private key; run chmod 0700 %s",
			dir, info.Mode().Perm(), dir)
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600) //nolint:gosec // the directory is the operator's choice
	if err != nil {
		return nil, fmt.Errorf("open the agent's state directory: %w", err)
	}
	take := func() error { return unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) }
	if err := provider.Lock(take); err != nil {
		lock.Close() //nolint:errcheck,gosec // nothing was written
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another agent uses the state directory %s: stop it first, or give this one another --state-dir", dir)
		}
		return nil, fmt.Errorf("lock the agent's state directory %s: %w", dir, err)
	}
	return &State{dir: dir, lock: lock}, nil
}

// Close releases the directory.
func (s *State) Close() error {
	if err := s.lock.Close(); err != nil {
		return fmt.Errorf("close the agent's state directory: %w", err)
	}
	return nil
}

// controlPlane returns whom the agent obeys; the zero value before it joined.
func (s *State) controlPlane() (controlPlane, error) {
	var c controlPlane
	path := filepath.Join(s.dir, controlPlaneFile)
	text, err := os.ReadFile(path) //nolint:gosec // the directory is the operator's choice
	if errors.Is(err, os.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return c, fmt.Errorf("read whom the agent obeys: %w", err)
	}
	if err := json.Unmarshal(text, &c); err != nil || c.ServerID == "" {
		return c, fmt.Errorf("%s is damaged (%w): it says which control plane this agent obeys; restore it, "+
			"or move the directory away and join again with a new token", path, errors.Join(err, errors.New("no server id")))
	}
	return c, nil
}

// setControlPlane stores whom the agent obeys.
func (s *State) setControlPlane(c controlPlane) error {
	text, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return fmt.Errorf("store whom the agent obeys: %w", err)
	}
	return s.write(controlPlaneFile, append(text, '\n'))
}

// ledger reads what is known of all machines.
func (s *State) ledger() (map[string]launchRecord, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, ledgerDir))
	if err != nil {
		return nil, fmt.Errorf("read the ledger of machines: %w", err)
	}
	records := make(map[string]launchRecord, len(entries))
	for _, e := range entries {
		path := filepath.Join(s.dir, ledgerDir, e.Name())
		if !validID("mch", e.Name()) {
			if strings.HasSuffix(e.Name(), temporarySuffix) { // a crash in mid-write
				if err := os.Remove(path); err != nil {
					return nil, fmt.Errorf("clean the ledger of machines: %w", err)
				}
			}
			continue
		}
		text, err := os.ReadFile(path) //nolint:gosec // the name was checked
		if err != nil {
			return nil, fmt.Errorf("read the ledger of machines: %w", err)
		}
		record := launchRecord(strings.TrimSpace(string(text)))
		switch record {
		case launching, launched, stopping, ended:
		default:
			return nil, fmt.Errorf("the ledger entry %s is damaged (it says %q): "+
				"if that machine is still wanted write \"launched\" into it, else \"ended\"", path, record)
		}
		records[e.Name()] = record
	}
	return records, nil
}

// note stores what is known of a machine, durably.
func (s *State) note(machine string, record launchRecord) error {
	return s.write(filepath.Join(ledgerDir, machine), []byte(record+"\n"))
}

// forget removes what is known of a machine.
func (s *State) forget(machine string) error {
	if err := os.Remove(filepath.Join(s.dir, ledgerDir, machine)); err != nil {
		return fmt.Errorf("forget machine %s: %w", machine, err)
	}
	return nil
}

// write replaces a file in one step, mode 0600, durable when it returns.
func (s *State) write(name string, content []byte) (err error) {
	path := filepath.Join(s.dir, name)
	defer func() {
		if err != nil {
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	f, err := os.OpenFile(path+temporarySuffix, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600) //nolint:gosec // the directory is the operator's choice
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// validID checks the form of the protocol's ids: a kind's prefix and 32
// lower-case hexadecimal digits. Ids reach paths.
func validID(kind, id string) bool {
	digits, ok := strings.CutPrefix(id, kind+"_")
	return ok && len(digits) == 32 && strings.Trim(digits, "0123456789abcdef") == ""
}

// idTime is when a valid id was made, to the millisecond: ids are UUIDs of
// version 7 (RFC 9562, section 5.7).
func idTime(id string) time.Time {
	_, digits, _ := strings.Cut(id, "_")
	ms, err := strconv.ParseInt(digits[:12], 16, 64)
	if err != nil {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}
