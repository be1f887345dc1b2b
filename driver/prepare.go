package driver

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	bx "github.com/docker/buildx/driver"
	"github.com/docker/buildx/util/dockerutil"
	"github.com/docker/buildx/util/progress"
	bkclient "github.com/moby/buildkit/client"
	dockerclient "github.com/moby/moby/client"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// engineTimeout is how long the local engine may take to answer a ping.
const engineTimeout = 3 * time.Second

// PrepareBuild refuses what cannot work, with the way out, before anything is
// solved; and it narrows a default load over several nodes to the client's own
// architecture.
func (d *Driver) PrepareBuild(ctx context.Context, opt *bx.PrepareBuildOptions) error {
	if err := d.checkPlatforms(opt.Platforms); err != nil {
		return err
	}
	if opt.Progress != nil {
		if s, err := d.factory.session(d.endpoint.Server()); err == nil {
			if l := d.factory.leases.entry(d.key(s)).current(); l != nil {
				showNotices(opt.Progress.Write, l)
			}
		}
	}
	if opt.NoOutput {
		return nil
	}
	exports, err := d.exports(opt.SolveOpt.Exports, opt.MultiDriver)
	if err != nil {
		return err
	}
	if narrowed := len(exports) < len(opt.SolveOpt.Exports); narrowed && opt.Progress != nil {
		_ = progress.Write(opt.Progress, "[depot] not loading "+platformList(opt.Platforms)+": the local engine gets "+runtime.GOARCH+" only", func() error { return nil })
	}
	opt.SolveOpt.Exports = exports
	if opt.MultiDriver && len(exports) == 1 && intoEngine(exports[0]) && len(opt.Platforms) == 1 {
		// Of several nodes buildx asks manifest lists, which an engine cannot
		// load. What is left here is a single image.
		delete(opt.SolveOpt.FrontendAttrs, "multi-platform")
	}
	for _, e := range exports {
		if intoEngine(e) {
			return d.checkEngine(ctx, opt, e)
		}
	}
	return nil
}

// checkPlatforms refuses platforms that no machine of this node builds. buildx
// sends what no node matches to the first one.
func (d *Driver) checkPlatforms(ps []ocispecs.Platform) error {
	bad := slices.DeleteFunc(slices.Clone(ps), func(p ocispecs.Platform) bool { return builds(d.endpoint.Arch, p) })
	if len(bad) == 0 {
		return nil
	}
	d.mu.Lock()
	archs := []string{d.endpoint.Arch}
	for _, a := range d.known {
		if a.GetName() != d.endpoint.Arch {
			archs = append(archs, a.GetName())
		}
	}
	d.mu.Unlock()
	var can []string
	for _, a := range archs {
		can = append(can, platformsOf(a)...)
	}
	return fmt.Errorf("project %s has no machine for %s: it builds %s; choose --platform among these, or start an agent with a pool for the others, see `docker depot pool ls`",
		d.endpoint.Name(), platformList(bad), strings.Join(can, ", "))
}

// exports checks and narrows a build's outputs for this node.
func (d *Driver) exports(all []bkclient.ExportEntry, several bool) ([]bkclient.ExportEntry, error) {
	if !several {
		return all, nil
	}
	out := make([]bkclient.ExportEntry, 0, len(all))
	for _, e := range all {
		switch {
		case intoEngine(e) && d.opts.defaultLoad:
			if d.endpoint.Arch == runtime.GOARCH {
				out = append(out, e)
			}
		case intoEngine(e):
			return nil, fmt.Errorf("an image of several architectures cannot be loaded into the local engine: use --push, or --load with --platform linux/%s alone", runtime.GOARCH)
		case e.Type == bkclient.ExporterOCI || e.Type == bkclient.ExporterDocker || e.Type == bkclient.ExporterTar:
			return nil, fmt.Errorf("output type=%s cannot hold what several machines build: use --push or --output type=local, or build one --platform at a time", e.Type)
		default:
			out = append(out, e)
		}
	}
	return out, nil
}

// intoEngine reports whether e loads an image into a Docker Engine.
func intoEngine(e bkclient.ExportEntry) bool {
	return e.Type == bkclient.ExporterDocker && e.Output == nil && e.OutputDir == "" && e.OutputStore == nil
}

// checkEngine tells of an engine that does not answer before the build, rather
// than by a closed pipe after it.
func (d *Driver) checkEngine(ctx context.Context, opt *bx.PrepareBuildOptions, e bkclient.ExportEntry) error {
	if opt.Docker == nil {
		return nil
	}
	engine, err := opt.Docker.API(e.Attrs["context"])
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, engineTimeout)
		defer cancel()
		_, err = engine.Ping(ctx, dockerclient.PingOptions{})
	}
	if err == nil {
		return d.checkStore(ctx, opt, e)
	}
	way := "leave --load away"
	if d.opts.defaultLoad {
		way = "set BUILDX_NO_DEFAULT_LOAD=1"
	}
	return fmt.Errorf("the image cannot be loaded: no Docker Engine answers (%w). Start one, choose another output such as --push, or %s to keep the result in the cache only", err, way)
}

// checkStore refuses an image of several platforms for an engine whose store
// holds one of each name.
func (d *Driver) checkStore(ctx context.Context, opt *bx.PrepareBuildOptions, e bkclient.ExportEntry) error {
	if len(opt.Platforms) < 2 || opt.Docker.Features(ctx, e.Attrs["context"])[dockerutil.OCIImporter] {
		return nil
	}
	return fmt.Errorf("an image for %s cannot be loaded: the Docker Engine's image store holds one platform of each image. "+
		"Use --push, load one --platform alone, or give the engine the containerd image store", platformList(opt.Platforms))
}
