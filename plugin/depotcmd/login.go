package depotcmd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

func (a *app) loginCommand() *cobra.Command {
	var server string
	var tokenStdin bool
	cmd := &cobra.Command{
		Use:   "login [OPTIONS]",
		Short: "Log in to a control plane",
		Long: "Log in to a control plane with a token. The token is checked, then kept in the keyring, or in a file that only you can read.\n" +
			"Without --token-stdin it is asked for; it is never taken from the command line, where others could see it.",
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.login(cmd.Context(), server, tokenStdin)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().StringVar(&server, "server", "", "URL of the server (default: $DEPOT_API_URL, else that of the stored login)")
	cmd.Flags().BoolVar(&tokenStdin, "token-stdin", false, "Read the token from standard input")
	return cmd
}

func (a *app) login(ctx context.Context, server string, tokenStdin bool) error {
	if server == "" {
		server = a.deps.Getenv(envServer)
	}
	if server == "" {
		stored, err := a.deps.Logins.Current()
		if err != nil && !errors.Is(err, ErrNoLogin) {
			return fmt.Errorf("read the stored login: %w", err)
		}
		server = stored.URL
	}
	if server == "" {
		return errors.New("no server is known: name it with --server https://host[:port], or start one on this host with `docker depot up`")
	}
	u, err := client.ParseURL(server)
	if err != nil {
		return err
	}
	text, err := a.readToken(tokenStdin, u.String())
	if err != nil {
		return err
	}
	token, err := client.ParseToken(text)
	if err != nil {
		return err
	}
	login := Login{URL: u.String(), Token: token}
	who, place, err := a.checkAndSave(ctx, login)
	if err != nil {
		return err
	}
	a.println(fmt.Sprintf("Logged in to %s as %s; the token is kept in %s.", login.URL, describe(who), place))
	if a.deps.Getenv(envToken) != "" {
		a.notef("Note: %s is set and goes before this login.", envToken)
	}
	return nil
}

// checkAndSave stores a login that the server accepts.
func (a *app) checkAndSave(ctx context.Context, login Login) (*depotv1.WhoAmIResponse, string, error) {
	c, err := a.dial(login)
	if err != nil {
		return nil, "", err
	}
	defer c.Close()
	who, err := c.Admin.WhoAmI(ctx, &depotv1.WhoAmIRequest{})
	if err != nil {
		return nil, "", err
	}
	place, err := a.deps.Logins.Save(login)
	if err != nil {
		return nil, "", fmt.Errorf("store the login: %w", err)
	}
	return who, place, nil
}

func (a *app) readToken(fromStdin bool, server string) (string, error) {
	if fromStdin {
		text, err := io.ReadAll(io.LimitReader(a.cli.In(), 4096))
		if err != nil {
			return "", fmt.Errorf("read the token: %w", err)
		}
		if strings.TrimSpace(string(text)) == "" {
			return "", errors.New("standard input holds no token: pipe it in, like `docker depot login --token-stdin < file`")
		}
		return string(text), nil
	}
	if !a.cli.In().IsTerminal() {
		return "", errors.New("there is no terminal to ask for the token on: use --token-stdin")
	}
	fmt.Fprintf(a.cli.Err(), "Token for %s: ", server) //nolint:errcheck // without the prompt the question still stands
	defer a.notef("")
	if fd := int(a.cli.In().FD()); term.IsTerminal(fd) { //nolint:gosec // a file descriptor is a small number
		text, err := term.ReadPassword(fd)
		if err != nil {
			return "", fmt.Errorf("read the token: %w", err)
		}
		return string(text), nil
	}
	text, err := bufio.NewReader(a.cli.In()).ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("read the token: %w", err)
	}
	return text, nil
}

func (a *app) logoutCommand() *cobra.Command {
	var server string
	cmd := &cobra.Command{
		Use:   "logout [OPTIONS]",
		Short: "Forget a login",
		Long:  "Forget a login on this host. The token stays good: revoke it with `docker depot token rm`.",
		Args:  exactArgs(),
		RunE: func(*cobra.Command, []string) error {
			return a.logout(server)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().StringVar(&server, "server", "", "URL of the server (default: that of the current login)")
	return cmd
}

func (a *app) logout(server string) error {
	var login Login
	var err error
	if server == "" {
		login, err = a.deps.Logins.Current()
	} else {
		u, parseErr := client.ParseURL(server)
		if parseErr != nil {
			return parseErr
		}
		login, err = a.deps.Logins.Find(u.String())
	}
	switch {
	case errors.Is(err, ErrNoLogin):
		a.println("Nobody is logged in: nothing to forget.")
		return nil
	case err != nil:
		return fmt.Errorf("read the stored login: %w", err)
	}
	if err := a.deps.Logins.Delete(login.URL); err != nil {
		return fmt.Errorf("forget the login for %s: %w", login.URL, err)
	}
	a.println("Forgot the login for " + login.URL + ".")
	return nil
}

func (a *app) whoamiCommand() *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "whoami [OPTIONS]",
		Short: "Show who you are to the control plane",
		Args:  exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.whoami(cmd.Context(), format)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().StringVar(&format, "format", "", `Format output: "json" or a Go template`)
	completeWith(cmd, "format", "json")
	return cmd
}

// identity is what whoami shows.
type identity struct {
	Server        string
	ServerID      string
	ServerVersion string
	Kind          string
	ID            string
	Name          string
	Role          string
	Organization  string     `json:",omitempty"`
	Project       string     `json:",omitempty"`
	Expires       *time.Time `json:",omitempty"`
	TokenFrom     string
}

func (a *app) whoami(ctx context.Context, format string) error {
	acc, err := a.access()
	if err != nil {
		return err
	}
	c, err := a.dial(acc.Login)
	if err != nil {
		return err
	}
	defer c.Close()
	who, err := c.Admin.WhoAmI(ctx, &depotv1.WhoAmIRequest{})
	if err != nil {
		return err
	}
	if format != "" {
		return inspectAll(a.cli.Out(), []string{acc.URL}, format, func(string) (any, error) {
			return identity{
				Server: acc.URL, ServerID: who.GetServerId(), ServerVersion: who.GetServerVersion(),
				Kind: who.GetKind(), ID: who.GetPrincipalId(), Name: who.GetName(), Role: who.GetRole(),
				Organization: who.GetOrganization(), Project: who.GetProject(), Expires: timeOf(who.GetExpires()),
				TokenFrom: string(acc.tokenFrom),
			}, nil
		})
	}
	a.println(describe(who))
	a.println(fmt.Sprintf("Server:  %s (version %s)", acc.URL, who.GetServerVersion()))
	a.println("Token:   from the " + string(acc.tokenFrom) + ", expires " + until(who.GetExpires(), time.Now()))
	return nil
}

// describe names a principal and what it may do.
func describe(who *depotv1.WhoAmIResponse) string {
	scope := "the whole server"
	switch {
	case who.GetProject() != "":
		scope = "project " + who.GetOrganization() + "/" + who.GetProject()
	case who.GetOrganization() != "":
		scope = "organization " + who.GetOrganization()
	}
	return fmt.Sprintf("%s %q, %s of %s", who.GetKind(), who.GetName(), who.GetRole(), scope)
}
