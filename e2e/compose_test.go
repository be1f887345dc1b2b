package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opendepot/depot/e2e/site"
)

// compose has a service that ends by itself, with what its image holds as its
// output.
const compose = `name: e2e
services:
  app:
    build: {context: ., target: app}
    image: composed
    network_mode: none
    command: ["cat", "/result"]
`

// composeBuilds builds with the real Compose plugin, and runs what was built.
func composeBuilds(t *testing.T, home *site.Home) {
	t.Helper()
	plugin := filepath.Join(home.Docker(), "cli-plugins", "docker-compose")
	if err := os.Symlink(filepath.Join(site.Deps(t), "bin", "docker-compose"), plugin); err != nil {
		t.Fatal(err)
	}
	out := home.CLI(t, "compose", "--progress", "plain", "build")
	wantCached(t, 5, out)
	if r := home.TryCLI(t, "image", "inspect", "composed"); r.Code != 0 {
		t.Errorf("compose build left no image: %s", r.All())
	}
	defer home.CLI(t, "compose", "down")
	up := home.CLI(t, "compose", "--progress", "plain", "up", "--build", "--no-log-prefix", "--force-recreate")
	if !strings.Contains(up.Out, "one\nmachine buildkitsandbox ") {
		t.Errorf("compose up does not run what was built:\n%s", up.All())
	}
}
