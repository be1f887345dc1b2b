package depotcmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
)

// The variables that Depot's users know.
const (
	envToken   = "DEPOT_TOKEN"
	envServer  = "DEPOT_API_URL"
	envProject = "DEPOT_PROJECT_ID"
)

// projectFile names a directory's project.
const projectFile = "depot.json"

// completionTimeout bounds what pressing the tab key may cost.
const completionTimeout = 3 * time.Second

// ErrNoLogin is returned by [Logins.Current] where nothing is stored.
var ErrNoLogin = errors.New("no login is stored")

// Login is a server and the token to call it with.
type Login struct {
	// URL is the server's, in the form that [client.ParseURL] gives.
	URL string
	// Token may be zero: then only the URL is known.
	Token client.Token
}

// Logins keeps a user's logins, at most one per server, one of them current.
type Logins interface {
	// Current returns the current login, or ErrNoLogin.
	Current() (Login, error)
	// Find returns the login for a server, or ErrNoLogin.
	Find(url string) (Login, error)
	// Save stores a login and makes it the current one. It says where the
	// secret went, in words: "the keyring", or a file's name.
	Save(Login) (place string, err error)
	// Delete forgets a server's login; one that is not there is no error.
	Delete(url string) error
}

// source says where a setting came from, for messages and `doctor`.
type source string

const (
	fromEnvironment source = "environment"
	fromLogin       source = "stored login"
)

// access is how to reach the server.
type access struct {
	Login
	urlFrom, tokenFrom source
}

// access finds the server and the token: the environment first, then the
// stored login.
func (a *app) access() (access, error) {
	var acc access
	if text := a.deps.Getenv(envServer); text != "" {
		u, err := client.ParseURL(text)
		if err != nil {
			return acc, fmt.Errorf("%s: %w", envServer, err)
		}
		acc.URL, acc.urlFrom = u.String(), fromEnvironment
	}
	if text := a.deps.Getenv(envToken); text != "" {
		token, err := client.ParseToken(text)
		if err != nil {
			return acc, fmt.Errorf("%s: %w", envToken, err)
		}
		acc.Token, acc.tokenFrom = token, fromEnvironment
	}
	if acc.URL != "" && !acc.Token.IsZero() {
		return acc, nil
	}
	stored, err := a.storedLogin(acc.URL)
	switch {
	case errors.Is(err, ErrNoLogin) && acc.URL != "":
		return acc, fmt.Errorf("there is no login for %s: run `docker depot login --server %s`, or set %s", acc.URL, acc.URL, envToken)
	case errors.Is(err, ErrNoLogin) && !acc.Token.IsZero():
		return acc, fmt.Errorf("%s is set, but no server is known: set %s to the server's URL as well", envToken, envServer)
	case errors.Is(err, ErrNoLogin):
		return acc, fmt.Errorf("nobody is logged in: run `docker depot login --server URL`, set %s and %s, or start a server on this host with `docker depot up`", envServer, envToken)
	case err != nil:
		return acc, fmt.Errorf("read the stored login: %w", err)
	}
	if acc.URL == "" {
		acc.URL, acc.urlFrom = stored.URL, fromLogin
	}
	if acc.Token.IsZero() {
		acc.Token, acc.tokenFrom = stored.Token, fromLogin
	}
	return acc, nil
}

func (a *app) storedLogin(url string) (Login, error) {
	if url == "" {
		return a.deps.Logins.Current()
	}
	return a.deps.Logins.Find(url)
}

// connect returns a client for the server of this session. The caller closes
// it.
func (a *app) connect() (*client.Client, error) {
	acc, err := a.access()
	if err != nil {
		return nil, err
	}
	return a.dial(acc.Login)
}

func (a *app) dial(login Login) (*client.Client, error) {
	return client.New(client.Config{URL: login.URL, Token: login.Token, UserAgent: "docker-depot/" + a.deps.Version})
}

// withClient runs do with a client.
func (a *app) withClient(do func(*client.Client) error) error {
	c, err := a.connect()
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

// projectSetting finds the project that the surroundings name: the flag's
// value, the environment, the nearest depot.json. It is empty if none does.
func (a *app) projectSetting(flag string) (text, from string, err error) {
	if flag != "" {
		return flag, "--project", nil
	}
	if text := a.deps.Getenv(envProject); text != "" {
		return text, envProject, nil
	}
	id, path, err := findProjectFile(a.deps.WorkingDir)
	return id, path, err
}

// findProjectFile reads the nearest depot.json in dir or above it.
func findProjectFile(dir string) (id, path string, err error) {
	for dir != "" {
		path = filepath.Join(dir, projectFile)
		text, err := os.ReadFile(path) //nolint:gosec // the file's place is the convention
		switch {
		case err == nil:
			id, err := parseProjectFile(path, text)
			return id, path, err
		case !errors.Is(err, fs.ErrNotExist):
			return "", path, fmt.Errorf("read the project's file: %w", err)
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			break
		}
		dir = parent
	}
	return "", "", nil
}

// parseProjectFile reads a depot.json; its errors name the file, the line and
// the column.
func parseProjectFile(path string, text []byte) (string, error) {
	var file struct {
		ID string `json:"id"`
	}
	err := json.Unmarshal(text, &file)
	var (
		syntax *json.SyntaxError
		kind   *json.UnmarshalTypeError
	)
	switch {
	case errors.As(err, &syntax):
		return "", fmt.Errorf("%s is not valid JSON: %w. Mend or remove it: it should read {\"id\": \"<project>\"}", place(path, text, syntax.Offset), err)
	case errors.As(err, &kind):
		return "", fmt.Errorf("%s has a %s where a project's id belongs. It should read {\"id\": \"<project>\"}", place(path, text, kind.Offset), kind.Value)
	case err != nil:
		return "", fmt.Errorf("%s: %w", path, err)
	case file.ID == "":
		return "", fmt.Errorf("%s names no project: it should read {\"id\": \"<project>\"}", path)
	}
	return file.ID, nil
}

// place is "file:line:column" of the byte that offset points behind.
func place(path string, text []byte, offset int64) string {
	before := string(text[:min(max(int(offset)-1, 0), len(text))])
	line := strings.Count(before, "\n") + 1
	column := len(before) - strings.LastIndex(before, "\n")
	return fmt.Sprintf("%s:%d:%d", path, line, column)
}

// quickly bounds a call made for a completion.
func quickly(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, completionTimeout)
}
