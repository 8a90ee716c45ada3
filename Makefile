# Everything one can do here. Each target sets up what it needs, in this checkout only (.venv/).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# make PYTHON=python3.13 VENV=.venv-3.13: another Python beside it.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := shared helper server simulation tests docs deployments

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

.PHONY: venv
venv: $(READY) ## make .venv/ with qat-helper and qat-plugin in its bin

$(READY): requirements/dev.txt shared/pyproject.toml helper/pyproject.toml server/pyproject.toml simulation/pyproject.toml
	@echo "==> $(VENV): installing the locked requirements (requirements/dev.txt) and the four distributions"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": run make PYTHON=python3.11")'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e shared -e helper -e server -e simulation
	@touch $@

.PHONY: demo
demo: $(READY) ## run helper and server on a simulated node (no hardware, no root, under 30 s)
	@echo "==> demo: the real helper and server on a simulated node"
	@$(BIN)/qat-plugin demo

.PHONY: test
test: $(READY) ## run the unit and the simulated-node tests
	@echo "==> test: unit tests and the simulated node"
	@$(BIN)/pytest -q tests/unit tests/node

.PHONY: test-kubelet
test-kubelet: $(READY) ## run helper and server against the kubelet's own code (needs Go; root for all of it)
	@echo "==> test-kubelet: the kubelet's device, topology and plugin managers, compiled; as in production where root"
	@tests/kubelet/build
	@$(BIN)/pytest -q tests/kubelet

.PHONY: test-kernel
test-kernel: $(READY) ## run both processes on a real kernel, in QEMU (x86_64, root; installs Debian packages)
	@echo "==> test-kernel: Debian's kernel in QEMU, without hardware virtualisation, with PCI devices that a test module makes"
	@tests/kernel/prepare
	@tests/kubelet/build
	@$(BIN)/python -m compileall -q shared helper server simulation tests # the guest's processes may not write it down
	@$(BIN)/pytest -q tests/kernel

.PHONY: test-node
test-node: $(VENV)/.deployments ## run the images and manifests in pods on a node in QEMU: kubelet, containerd (as test-kernel, and Go)
	@echo "==> test-node: the kubelet, containerd and systemd in the guest; our images, the DaemonSet's pod as a static one"
	@tests/cluster/prepare
	@$(BIN)/pytest -q $(foreach each,base confined lifecycle reboot,tests/cluster/test_$(each).py)

.PHONY: test-cluster
test-cluster: $(VENV)/.deployments ## a whole cluster, in QEMU: kubectl, the README's commands (as test-node; builds Kubernetes)
	@echo "==> test-cluster: etcd, kube-apiserver, controllers, scheduler: without a node first, then with one in the guest"
	@tests/cluster/prepare
	@tests/cluster/build etcd kube-apiserver kube-controller-manager kube-scheduler kubectl
	@tests/cluster/build nfd-manifests kubectl-nfd nfd-master nfd-worker
	@$(BIN)/pytest -q tests/cluster/test_nfd_rule.py tests/cluster/test_accepted.py tests/cluster/test_admission.py tests/cluster/test_cluster*.py

.PHONY: test-security
test-security: $(READY) ## the sandboxes from inside; hostile clients: fuzzing, floods, races, kills (root for all of it)
	@echo "==> test-security: sandboxes, hostile clients (QAT_FUZZ_DECODER=1000000 QAT_FUZZ_SOCKET=1000000: more of it)"
	@$(BIN)/pytest -q tests/helper_security

.PHONY: test-deployments
test-deployments: $(VENV)/.deployments ## render and check the manifests, build and run the images (needs Go; root for the images)
	@echo "==> test-deployments: manifests, units, and both images run as the base says, on the simulated node"
	@tests/deployments/tools/build
	@$(BIN)/pytest -q tests/deployments

$(VENV)/.deployments: $(READY) requirements/deployments.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/deployments.txt
	@touch $@

.PHONY: images
images: ## build both images (BASE, BUILDER, TAG, OPTIONS: see deployments/images/build)
	@deployments/images/build

.PHONY: check
check: $(READY) ## ruff, mypy strict, import rules; generated code, flag reference and room tables are current
	@echo "==> check: ruff, mypy, import-linter, generated code"
	@$(BIN)/ruff format --check -q $(SOURCES)
	@$(BIN)/ruff check -q $(SOURCES)
	@$(BIN)/mypy
	@PYTHONPATH=shared:helper:server:simulation $(BIN)/lint-imports
	@protos/generate --check
	@$(BIN)/python docs/reference.py --check
	@$(BIN)/python docs/rooms.py --check

.PHONY: format
format: $(READY) ## format the sources and apply the safe lint fixes
	@$(BIN)/ruff check -q --fix $(SOURCES)
	@$(BIN)/ruff format -q $(SOURCES)

.PHONY: bench
bench: $(READY) ## measure side by side with a plain grpc.aio service (minutes; not a test)
	@echo "==> bench: ratios to a plain grpc.aio no-op in the same run"
	@PYTHONPATH=tests $(BIN)/python -m bench

.PHONY: protos
protos: $(READY) ## generate server/qat_server/kubelet/generated from protos/
	@protos/generate

.PHONY: docs
docs: $(READY) ## write docs/configuration.md from the flags, and the room tables in docs/architecture.md
	@$(BIN)/python docs/reference.py
	@$(BIN)/python docs/rooms.py

.PHONY: lock
lock: ## resolve requirements/*.in into locked files with hashes (needs uv)
	@cd requirements && for f in helper server dev deployments images; do \
	  uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate $$f.in -o $$f.txt; done

.PHONY: clean
clean: ## remove what the other targets made
	@rm -rf .venv .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build
