// The images of the control plane and of the agent. `make images` compiles the
// programs for both architectures first and then runs this on whatever builder
// is current:
//
//   make images BAKE_FLAGS='--push --set *.tags=…'

variable "REPOSITORY" {
  default     = "opendepot"
  description = "Where the images go, without a trailing slash."
}

variable "TAG" {
  default     = "dev"
  description = "The tag of both images."
}

group "default" {
  targets = ["controlplane", "agent"]
}

target "_image" {
  context   = "hack/images"
  platforms = ["linux/amd64", "linux/arm64"]
  contexts = {
    files = "build/images"
  }
}

target "controlplane" {
  inherits   = ["_image"]
  dockerfile = "controlplane.Dockerfile"
  tags       = ["${REPOSITORY}/depot-controlplane:${TAG}"]
}

target "agent" {
  inherits   = ["_image"]
  dockerfile = "agent.Dockerfile"
  tags       = ["${REPOSITORY}/depot-agent:${TAG}"]
}
