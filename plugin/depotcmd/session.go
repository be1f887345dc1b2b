package depotcmd

import (
	"context"
	"fmt"
	"strings"
	"time"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/driver/credentials"
)

// completionTimeout bounds what pressing the tab key may cost.
const completionTimeout = 3 * time.Second

// access is how to reach the server, and where the token is from.
type access struct {
	config    client.Config
	tokenFrom string
}

// access finds the server and the token: the environment first, then the
// stored login.
func (a *app) access() (access, error) {
	server, err := a.deps.Source.Server()
	if err != nil {
		return access{}, err
	}
	config, err := a.deps.Source.Config(server)
	if err != nil {
		return access{}, err
	}
	config.UserAgent = a.userAgent()
	return access{config: config, tokenFrom: a.tokenFrom(server)}, nil
}

// tokenFrom says in words where the token for a server is taken from.
func (a *app) tokenFrom(server string) string {
	if a.deps.Source.Env(credentials.EnvToken) != "" {
		return credentials.EnvToken
	}
	if login, err := a.deps.Source.Store.Load(server); err == nil && login.InKeyring {
		return "the keyring"
	}
	return a.deps.Source.Store.Dir()
}

func (a *app) userAgent() string { return "docker-depot/" + a.deps.Version }

// withClient runs do with a client for the server of this session.
func (a *app) withClient(do func(*client.Client) error) error {
	acc, err := a.access()
	if err != nil {
		return err
	}
	return withConfig(acc.config, do)
}

func withConfig(config client.Config, do func(*client.Client) error) error {
	c, err := client.New(config)
	if err != nil {
		return err
	}
	defer c.Close()
	return do(c)
}

// parseProject reads a project as people write it: an id, a name, or
// organization/name.
func parseProject(text string) (*depotv1.ProjectRef, error) {
	org, name, both := strings.Cut(text, "/")
	switch {
	case text == "", both && (org == "" || name == ""), strings.Contains(name, "/"), strings.ContainsAny(text, " :\\"):
		return nil, fmt.Errorf("%q names no project: write organization/name, name, or the id", text)
	case both:
		return &depotv1.ProjectRef{Organization: org, Name: name}, nil
	case strings.HasPrefix(text, "prj_"):
		return &depotv1.ProjectRef{Id: text}, nil
	default:
		return &depotv1.ProjectRef{Name: text}, nil
	}
}

// quickly bounds a call made for a completion.
func quickly(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, completionTimeout)
}
