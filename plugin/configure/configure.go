// Package configure makes a user's docker CLI build on depot, and takes that
// back.
//
// [Install] puts this program into the CLI's plugin directory as docker-buildx
// and docker-depot, makes a builder and makes it the current one everywhere,
// and sets the alias that leads plain `docker build` to it. [Uninstall] puts
// back what was there, byte for byte.
//
// What was there is kept beside config.json, in depot/: a manifest, and copies
// of the files that were replaced. Both are durable before anything is
// touched, so that a crash at any point is undone by Uninstall or finished by
// Install. A file that the user changed after Install is not put back: only
// what is depot's is taken out of it, and the user is told.
package configure

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/docker/buildx/builder"
	"github.com/docker/buildx/driver"
	"github.com/docker/buildx/store"
	"github.com/docker/buildx/store/storeutil"
	"github.com/docker/buildx/util/confutil"
	"github.com/docker/buildx/util/dockerutil"
	"github.com/docker/cli/cli/command"
	"github.com/gofrs/flock"
)

// DriverName is the buildx driver that the builder uses.
const DriverName = "depot"

// The program's names in the plugin directory.
const (
	buildxPlugin = "docker-buildx"
	depotPlugin  = "docker-depot"
)

// Options say what to install.
type Options struct {
	// Executable is the program's own file, links resolved.
	Executable string
	// Builder is the builder's name.
	Builder string
	// Endpoint is what the builder leads to: depot://host[:port]/org/project.
	Endpoint string
	// DriverOpts are options of the driver, by name.
	DriverOpts map[string]string
	// Login is the login whose project the caller changes; nil if it changes
	// none.
	Login *LoginProject
}

// LoginProject is the project of a stored login, before and after it was
// configured. The login is the caller's to change; it is kept here so that
// [Uninstall] can tell what to put back.
type LoginProject struct {
	// Server is the login's URL.
	Server string `json:"server"`
	// Before and After are names of projects; an empty one is none.
	Before string `json:"before"`
	After  string `json:"after"`
}

// Report tells people what was done and what they should know.
type Report struct {
	Done, Notes []string
	// Login is what [Uninstall] leaves for the caller to put back, if the
	// login still has the project After; nil if there is nothing.
	Login *LoginProject
}

func (r *Report) donef(format string, args ...any) {
	r.Done = append(r.Done, fmt.Sprintf(format, args...))
}

func (r *Report) notef(format string, args ...any) {
	r.Notes = append(r.Notes, fmt.Sprintf(format, args...))
}

// Paths are the places that Install touches.
type Paths struct {
	// Config is config.json, links resolved.
	Config string
	// Plugins is the CLI's plugin directory of this user.
	Plugins string
	// Buildx is buildx's directory.
	Buildx string
	// State is where the manifest and the copies are.
	State string
}

// PathsOf returns the places for a docker CLI's configuration.
func PathsOf(dockerCli command.Cli) (Paths, error) {
	config, err := filepath.Abs(dockerCli.ConfigFile().Filename)
	if err != nil {
		return Paths{}, err
	}
	dir := filepath.Dir(config)
	if real, err := filepath.EvalSymlinks(config); err == nil {
		config = real
	} else if !errors.Is(err, fs.ErrNotExist) {
		return Paths{}, err
	}
	buildx, err := filepath.Abs(confutil.NewConfig(dockerCli).Dir())
	if err != nil {
		return Paths{}, err
	}
	return Paths{
		Config:  config,
		Plugins: filepath.Join(dir, "cli-plugins"),
		Buildx:  buildx,
		State:   filepath.Join(dir, "depot"),
	}, nil
}

// session is one run of Install or Uninstall.
type session struct {
	paths    Paths
	cli      command.Cli
	manifest *manifest
	report   *Report
}

// open locks the state directory and reads the manifest. Two runs at once wait
// for each other.
func open(dockerCli command.Cli) (*session, func(), error) {
	paths, err := PathsOf(dockerCli)
	if err != nil {
		return nil, nil, err
	}
	fresh := missingDirs(paths)
	if err := os.MkdirAll(paths.State, 0o700); err != nil {
		return nil, nil, err
	}
	lock := flock.New(filepath.Join(paths.State, "configure.lock"))
	if err := lock.Lock(); err != nil {
		return nil, nil, fmt.Errorf("lock %s: %w", paths.State, err)
	}
	m, err := readManifest(paths.State)
	if err != nil {
		return nil, nil, errors.Join(err, lock.Close())
	}
	if m.fresh {
		m.Dirs = fresh
	}
	s := &session{paths: paths, cli: dockerCli, manifest: m, report: &Report{}}
	return s, func() {
		if s.manifest.fresh { // nothing is installed: leave no trace
			os.Remove(lock.Path()) //nolint:errcheck,gosec // another run may be waiting with it
			s.removeDirs(fresh)
		}
		lock.Close() //nolint:errcheck,gosec // closing the file unlocks it whatever comes
	}, nil
}

// missingDirs lists the directories that do not exist yet, parents first.
func missingDirs(p Paths) []string {
	dirs := []string{filepath.Dir(p.State), p.State, p.Plugins, p.Buildx}
	for _, name := range []string{"instances", "defaults", "activity", "refs"} {
		dirs = append(dirs, filepath.Join(p.Buildx, name))
	}
	return slices.DeleteFunc(dirs, func(dir string) bool {
		_, err := os.Stat(dir)
		return err == nil
	})
}

// Install installs, or brings an installation up to date. If it fails on a CLI
// that was not configured before, everything is put back.
func Install(ctx context.Context, dockerCli command.Cli, o Options) (Report, error) {
	s, done, err := open(dockerCli)
	if err != nil {
		return Report{}, err
	}
	defer done()
	first := s.manifest.fresh
	if err := s.install(ctx, o); err != nil {
		if !first || s.manifest.fresh {
			return *s.report, err
		}
		return Report{}, errors.Join(err, s.uninstall(context.WithoutCancel(ctx)))
	}
	return *s.report, nil
}

func (s *session) install(ctx context.Context, o Options) error {
	config, err := s.planConfig()
	if err != nil {
		return err
	}
	plugins, err := s.planPlugins(o.Executable)
	if err != nil {
		return err
	}
	if err := s.checkBuilder(o.Builder); err != nil {
		return err
	}
	key, err := dockerutil.GetCurrentEndpoint(s.cli)
	if err != nil {
		return err
	}
	if err := s.noteAll(o, key, config, plugins); err != nil {
		return err
	}
	if err := s.makeBuilder(ctx, o, key); err != nil {
		return err
	}
	for _, path := range plugins {
		if err := s.copyProgram(o.Executable, path); err != nil {
			return err
		}
	}
	if err := s.writeConfig(config); err != nil {
		return err
	}
	return s.manifest.settle(s.paths.State)
}

// noteAll takes the snapshots, and makes them and the intent durable.
func (s *session) noteAll(o Options, key string, config configChange, plugins []string) error {
	m, state := s.manifest, s.paths.State
	m.Alias, m.ExtraDir, m.Previous = config.alias, config.extraDir, config.before.previous()
	current, err := currentName(filepath.Join(s.paths.Buildx, "current"))
	if err != nil {
		return err
	}
	noteChoice := m.note
	if slices.Contains(m.Builders, current) {
		noteChoice = m.keep // what an earlier run chose, not the user
	}
	if !slices.Contains(m.Builders, o.Builder) {
		m.Builders = append(m.Builders, o.Builder)
	}
	m.noteLogin(o.Login)
	program, err := stateOf(o.Executable)
	if err != nil {
		return err
	}
	for _, path := range plugins {
		if err := m.note(path, state); err != nil {
			return fmt.Errorf("keep a copy of %s: %w", path, err)
		}
		m.find(path).expect(program)
	}
	for _, path := range s.choiceFiles(key) {
		if err := noteChoice(path, state); err != nil {
			return fmt.Errorf("keep a copy of %s: %w", path, err)
		}
	}
	for _, path := range slices.Concat(s.builderFiles(o.Builder), s.buildFiles()) {
		if err := m.keep(path, state); err != nil {
			return fmt.Errorf("keep a copy of %s: %w", path, err)
		}
	}
	if config.changes {
		if err := m.noteText(s.paths.Config, state, config.before); err != nil {
			return fmt.Errorf("keep a copy of %s: %w", s.paths.Config, err)
		}
		m.find(s.paths.Config).expect(stateOfText(config.text))
	}
	return m.write(state)
}

// choiceFiles are the files in buildx's store that say which builder is the
// current one. The store names the default of a docker endpoint by a hash.
func (s *session) choiceFiles(key string) []string {
	sum := sha256.Sum256([]byte(key))
	return []string{
		filepath.Join(s.paths.Buildx, "current"),
		filepath.Join(s.paths.Buildx, "defaults", hex.EncodeToString(sum[:])[:20]),
	}
}

// builderFiles are the files in buildx's store that come with a builder.
func (s *session) builderFiles(name string) []string {
	return []string{
		filepath.Join(s.paths.Buildx, "instances", name),
		filepath.Join(s.paths.Buildx, "activity", name),
		filepath.Join(s.paths.Buildx, ".lock"),
	}
}

// buildFiles are the files that the first build makes, with whatever builder:
// buildx's name for this client, and the seed of the keys that it asks
// registries with. Both are made again when they are missed.
func (s *session) buildFiles() []string {
	dir := filepath.Dir(s.paths.State)
	return []string{
		filepath.Join(s.paths.Buildx, ".buildNodeID"),
		filepath.Join(dir, ".token_seed"),
		filepath.Join(dir, ".token_seed.lock"),
	}
}

// checkBuilder refuses the name of a builder that is not depot's.
func (s *session) checkBuilder(name string) error {
	if _, err := store.ValidateName(name); err != nil {
		return fmt.Errorf("builder name %q is not valid: use letters, digits, '.', '_' and '-', a letter first", name)
	}
	text, err := os.ReadFile(filepath.Join(s.paths.Buildx, "instances", name)) //nolint:gosec // the name was checked
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var group store.NodeGroup
	if err := json.Unmarshal(text, &group); err != nil {
		return fmt.Errorf("builder %q in buildx's store is damaged: %w: remove it with `docker buildx rm %s`", name, err, name)
	}
	if group.Driver != DriverName {
		return fmt.Errorf("there is a builder %q with the driver %q: choose another name with --builder", name, group.Driver)
	}
	return nil
}

// makeBuilder makes the builder, or gives one that exists the nodes that its
// endpoint has now, and makes it the current one for every docker context.
func (s *session) makeBuilder(ctx context.Context, o Options, key string) error {
	txn, release, err := storeutil.GetStore(s.cli)
	if err != nil {
		return fmt.Errorf("open buildx's store: %w", err)
	}
	defer release()
	_, err = txn.NodeGroupByName(o.Builder)
	switch {
	case err == nil:
		err = s.refreshBuilder(ctx, txn, o)
	case errors.Is(err, fs.ErrNotExist):
		_, err = builder.Create(ctx, txn, s.cli, builder.CreateOpts{
			Name: o.Builder, Driver: DriverName, Endpoint: o.Endpoint, DriverOpts: optionList(o.DriverOpts),
		})
	}
	if err != nil {
		return fmt.Errorf("make builder %q for %s: %w", o.Builder, o.Endpoint, err)
	}
	if err := txn.SetCurrent(key, o.Builder, true, false); err != nil {
		return fmt.Errorf("make builder %q the current one: %w", o.Builder, err)
	}
	s.report.donef("builder %q leads to %s and is the current one", o.Builder, o.Endpoint)
	return nil
}

func (s *session) refreshBuilder(ctx context.Context, txn *store.Txn, o Options) error {
	factory, err := driver.GetFactory(DriverName, true)
	if err != nil {
		return err
	}
	resolver, ok := factory.(driver.NodeResolver)
	if !ok {
		return fmt.Errorf("the driver %q of this program cannot resolve nodes", DriverName)
	}
	nodes, err := resolver.ResolveNodes(ctx, driver.Node{Endpoint: o.Endpoint, DriverOpts: o.DriverOpts})
	if err != nil {
		return err
	}
	group := &store.NodeGroup{Name: o.Builder, Driver: DriverName}
	for _, n := range nodes {
		if err := group.Update(n.Name, n.Endpoint, n.Platforms, n.EndpointSet, true, nil, "", n.DriverOpts); err != nil {
			return err
		}
	}
	return txn.Save(group)
}

func optionList(options map[string]string) []string {
	list := make([]string, 0, len(options))
	for name, value := range options {
		list = append(list, name+"="+value)
	}
	slices.Sort(list)
	return list
}
