# Recipes for people and for CI. `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build
MAKEFLAGS += --no-builtin-rules

# What the programs under test and the scripts are told.
export DEPOT_BIN := $(CURDIR)/bin
export DEPOT_DEPS := $(CURDIR)/build/deps
# The version is stamped below. Go need not ask git for it, which refuses in a
# clone that belongs to another user.
export GOFLAGS := $(GOFLAGS) -buildvcs=false

sources := $(shell find agent controlplane driver internal plugin -type f -not -name '*_test.go')
module := go list -m -f '{{.Version}}'

##@ Everyday

.PHONY: help
help: ## list these recipes
	@awk 'BEGIN { FS = ":.*## " } /^##@/ { printf "\n%s\n", substr($$0, 5) } /^[a-z0-9-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

programs := docker-depot docker-buildx depot-controlplane depot-agent
upstream := buildkitd buildkit-runc bridge loopback host-local

.PHONY: build
build: $(addprefix bin/,$(programs) $(upstream)) ## build all programs into ./bin
	@:

.PHONY: test
test: ## install what tests need, and run them all; needs root
	@hack/test root
	@hack/prereqs test
	@$(MAKE) --no-print-directory build deps
	@hack/test vet unit e2e

.PHONY: test-unit
test-unit: prereqs-build ## run the tests that need neither root nor the kernel
	@hack/test vet rootless

.PHONY: lint
lint: build/tools/golangci-lint build/tools/gofumpt build/tools/buf ## check style, imports, scripts and the protocol
	@hack/lint

.PHONY: generate
generate: build/tools/buf build/tools/protoc-gen-go build/tools/protoc-gen-connect-go ## write generated code again
	@hack/generate

.PHONY: check-generated
check-generated: build/tools/buf build/tools/protoc-gen-go build/tools/protoc-gen-connect-go ## fail if generated code or go.mod is stale
	@hack/generate --check

##@ The whole system on this host

.PHONY: demo
demo: ## set up everything, build a Dockerfile cold, warm, changed and for two platforms, take it down
	@hack/demo root
	@hack/prereqs demo
	@$(MAKE) --no-print-directory build deps-demo
	@hack/demo run

.PHONY: up
up: ## what demo does, but leave it running
	@hack/demo root
	@hack/prereqs demo
	@$(MAKE) --no-print-directory build deps-demo
	@hack/demo up

.PHONY: down
down: ## take down what `make up` left running, with its caches
	@hack/demo down

##@ Now and then

.PHONY: e2e
e2e: ## run only the end-to-end tests; RUN=regexp selects; needs root
	@hack/test root
	@hack/prereqs test
	@$(MAKE) --no-print-directory build deps
	@hack/test e2e

.PHONY: soak
soak: ## 10,000 random histories of the scheduler and the agent, and 20 kills in each window; needs root
	@hack/test root
	@hack/prereqs test
	@$(MAKE) --no-print-directory build deps
	@DEPOT_KILLS=20 hack/test properties e2e

.PHONY: bench
bench: ## measure speed and size: a table, and bench.json; needs root
	@hack/test root
	@hack/prereqs test
	@$(MAKE) --no-print-directory build deps
	go run ./e2e/bench -json bench.json

.PHONY: vm-test
vm-test: ## check hosts with cgroups of version 2 alone, emulated: minutes; needs root and Debian
	@hack/test root
	@hack/prereqs demo
	@$(MAKE) --no-print-directory build deps-demo
	@hack/vm systemd plain

.PHONY: images
images: bin/docker-buildx image-context ## build the images of both architectures with docker-bake.hcl
	bin/docker-buildx bake $(BAKE_FLAGS)

.PHONY: clean
clean: ## remove what was built; refuses while `make up` runs
	@hack/demo stopped
	rm -rf bin build bench.json

# The programs. Files that are linked in (migrations, pages) count as sources.

FORCE:

.PHONY: prereqs-build
prereqs-build:
	@hack/prereqs build

# build/version changes only when the version does.
build/version: FORCE
	@mkdir -p build
	@git describe --always --dirty >$@.new 2>/dev/null || echo unknown >$@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

bin/docker-depot: build/version go.mod go.sum $(sources) | prereqs-build
	@echo "build $@"
	@version="$$($(module) github.com/docker/buildx)+depot.$$(cat build/version)"; \
	CGO_ENABLED=0 go build -o $@ -ldflags "-X github.com/docker/buildx/version.Version=$$version \
		-X github.com/docker/buildx/version.Revision=$$(cat build/version)" ./plugin/cmd/docker-depot
	@touch $@

# The same program: it looks at the name that it was called by.
bin/docker-buildx: bin/docker-depot
	@ln -f $< $@

bin/depot-controlplane: build/version go.mod go.sum $(sources) | prereqs-build
	@echo "build $@"
	@CGO_ENABLED=0 go build -o $@ -ldflags "-X main.version=$$(cat build/version)" ./controlplane/cmd/depot-controlplane
	@touch $@

bin/depot-agent: build/version go.mod go.sum $(sources) | prereqs-build
	@echo "build $@"
	@CGO_ENABLED=0 go build -o $@ -ldflags "-X main.version=$$(cat build/version)" ./agent/cmd/depot-agent
	@touch $@

# From upstream, unmodified, at the versions in go.mod.

bin/buildkitd: go.mod go.sum | prereqs-build
	@echo "build $@"
	@CGO_ENABLED=0 go build -o $@ -ldflags "-X github.com/moby/buildkit/version.Version=$$($(module) github.com/moby/buildkit)" \
		github.com/moby/buildkit/cmd/buildkitd
	@touch $@

# Without the seccomp tag every RUN fails; static, so that it runs in a
# machine, whose root filesystem has no libraries.
bin/buildkit-runc: go.mod go.sum | prereqs-build
	@echo "build $@"
	@CGO_ENABLED=1 go build -o $@ -tags 'netgo osusergo seccomp' -ldflags '-extldflags -static' github.com/opencontainers/runc
	@touch $@

cni := github.com/containernetworking/plugins/plugins
bin/bridge: cni_package := $(cni)/main/bridge
bin/loopback: cni_package := $(cni)/main/loopback
bin/host-local: cni_package := $(cni)/ipam/host-local
bin/bridge bin/loopback bin/host-local: go.mod go.sum | prereqs-build
	@echo "build $@"
	@CGO_ENABLED=0 go build -o $@ $(cni_package)
	@touch $@

# The developers' tools, at the versions in tools/go.mod.

build/tools/buf: tool_package := github.com/bufbuild/buf/cmd/buf
build/tools/gofumpt: tool_package := mvdan.cc/gofumpt
build/tools/golangci-lint: tool_package := github.com/golangci/golangci-lint/v2/cmd/golangci-lint
build/tools/protoc-gen-go: tool_package := google.golang.org/protobuf/cmd/protoc-gen-go
build/tools/protoc-gen-connect-go: tool_package := connectrpc.com/connect/cmd/protoc-gen-connect-go
build/tools/%: tools/go.mod tools/go.sum
	@echo "build $@"
	@CGO_ENABLED=0 go build -C tools -o $(CURDIR)/$@ $(tool_package)
	@touch $@

# What the demo and the tests use, but the project does not ship.

.PHONY: deps deps-demo
deps: deps-demo $(addprefix build/deps/bin/,docker-compose dockerd docker-registry)
	@:
deps-demo: build/deps/bin/docker build/deps/busybox/amd64/busybox
	@:

build/deps/bin/docker: hack/deps
	@hack/deps docker
build/deps/bin/docker-compose: hack/deps
	@hack/deps compose
build/deps/bin/dockerd: hack/deps
	@hack/deps engine
build/deps/bin/docker-registry: hack/deps
	@hack/deps registry
build/deps/busybox/amd64/busybox: hack/deps
	@hack/deps busybox

# What docker-bake.hcl calls the context `files`.
.PHONY: image-context
image-context: build/version
	@mkdir -p build/images/empty
	@install -m 644 /etc/ssl/certs/ca-certificates.crt build/images/
	for arch in amd64 arm64; do \
		GOARCH=$$arch CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$$(cat build/version)" \
			-o build/images/$$arch/ ./controlplane/cmd/depot-controlplane ./agent/cmd/depot-agent; \
	done
