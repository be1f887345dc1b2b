package depotcmd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/driver/credentials"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

func (a *app) loginCommand() *cobra.Command {
	var server string
	var tokenStdin bool
	cmd := &cobra.Command{
		Use:   "login [OPTIONS] [SERVER]",
		Short: "Log in to a control plane",
		Long: "Log in to a control plane with a token. The token is checked, then kept in the keyring, or in a file that only you can read.\n" +
			"Without --token-stdin it is asked for; it is never taken from the command line, where others could see it.",
		Example: "  docker depot login --token-stdin https://depot.example.com < token",
		Args:    atMostOne("server"),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, arg := range args {
				if server != "" && server != arg {
					return usageError(cmd, errors.New("two servers were named: give one"))
				}
				server = arg
			}
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
		var err error
		if server, err = a.deps.Source.Server(); err != nil {
			return err
		}
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
	who, login, err := a.checkAndSave(ctx, credentials.Login{URL: u.String(), Token: token})
	if err != nil {
		return err
	}
	a.println(fmt.Sprintf("Logged in to %s as %s; the token is kept in %s.", login.URL, describe(who), a.keptIn(login)))
	if a.deps.Source.Env(credentials.EnvToken) != "" {
		a.notef("Note: %s is set and goes before this login.", credentials.EnvToken)
	}
	return nil
}

// keptIn says in words where a login's token is.
func (a *app) keptIn(login credentials.Login) string {
	if login.InKeyring {
		return "the keyring"
	}
	return "a file that only you can read, in " + a.deps.Source.Store.Dir()
}

// checkAndSave stores a login that the server accepts. A project that was
// chosen before is kept; a project's token chooses its own.
func (a *app) checkAndSave(ctx context.Context, login credentials.Login) (*depotv1.WhoAmIResponse, credentials.Login, error) {
	roots, err := a.deps.Source.Roots()
	if err != nil {
		return nil, login, err
	}
	var who *depotv1.WhoAmIResponse
	config := client.Config{URL: login.URL, Token: login.Token, Roots: roots, UserAgent: a.userAgent()}
	err = withConfig(config, func(c *client.Client) error {
		who, err = c.Admin.WhoAmI(ctx, &depotv1.WhoAmIRequest{})
		return err
	})
	if err != nil {
		return nil, login, err
	}
	if before, err := a.deps.Source.Store.Current(); err == nil && before.URL == login.URL && login.Project == "" {
		login.Project = before.Project
	}
	if who.GetProject() != "" {
		login.Project = who.GetOrganization() + "/" + who.GetProject()
	}
	login, err = a.deps.Source.Store.Save(login)
	return who, login, err
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
	if fd := int(a.cli.In().FD()); term.IsTerminal(fd) {
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
	if server == "" {
		current, err := a.deps.Source.Store.Current()
		if errors.Is(err, credentials.ErrNotFound) {
			a.println("Nobody is logged in: nothing to forget.")
			return nil
		}
		if err != nil {
			return err
		}
		server = current.URL
	}
	u, err := client.ParseURL(server)
	if err != nil {
		return err
	}
	err = a.deps.Source.Store.Delete(u.String())
	switch {
	case errors.Is(err, credentials.ErrNotFound):
		a.println("There is no login to " + u.String() + ": nothing to forget.")
	case err != nil:
		return err
	default:
		a.println("Forgot the login to " + u.String() + ".")
	}
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
	var who *depotv1.WhoAmIResponse
	err = withConfig(acc.config, func(c *client.Client) error {
		who, err = c.Admin.WhoAmI(ctx, &depotv1.WhoAmIRequest{})
		return err
	})
	if err != nil {
		return err
	}
	if format != "" {
		return inspectAll(a.cli.Out(), []string{acc.config.URL}, format, func(string) (any, error) {
			return identity{
				Server: acc.config.URL, ServerID: who.GetServerId(), ServerVersion: who.GetServerVersion(),
				Kind: who.GetKind(), ID: who.GetPrincipalId(), Name: who.GetName(), Role: who.GetRole(),
				Organization: who.GetOrganization(), Project: who.GetProject(), Expires: timeOf(who.GetExpires()),
				TokenFrom: acc.tokenFrom,
			}, nil
		})
	}
	a.println(describe(who))
	a.println(fmt.Sprintf("Server:  %s (version %s)", acc.config.URL, who.GetServerVersion()))
	a.println("Token:   from " + acc.tokenFrom + ", expires " + until(who.GetExpires(), time.Now()))
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
