// Package client is the thin client of depot's control plane: it connects,
// authenticates, repeats what may be repeated, and turns what goes wrong into
// sentences for people. Everything else is the generated Connect code.
//
//	c, err := client.New(client.Config{URL: "https://depot.example.com", Token: token})
//	if err != nil { … }
//	who, err := c.Admin.WhoAmI(ctx, &depotv1.WhoAmIRequest{})
//
// Every call but CreateToken may be repeated without harm, by the ids that its
// request carries, so a call that met a broken connection or a server that was
// just restarting is sent again a few times, within its context. Callers that
// must survive a longer absence of the server (a build, an agent) decide with
// [Temporary] and go on by themselves.
//
// The server is known by its pin where there is one, and otherwise by the
// system's roots and the URL's host. A token carries the pin of the server
// that made it, so that a URL and a token suffice.
package client
