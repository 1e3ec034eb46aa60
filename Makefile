# Every command of the project. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/qlora-operator
CLUSTER ?= local
CLUSTER_NAME ?= qlora
NODES ?= 2
PYTEST_ARGS ?=
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder # these tests mostly wait for processes that they started
HELM_ARGS ?=
KEEP ?=
NAMESPACE ?= default
UV := $(shell hack/uv.sh)
RUN := $(UV) run --frozen --no-sync
CTL := $(RUN) python -m hack.cluster
export CACHE CLUSTER CLUSTER_NAME NODES
unexport PYTHONDONTWRITEBYTECODE  # without bytecode every process compiles torch and transformers anew: 10 s each

##@ General
.PHONY: help
help: ## List the targets.
	@awk 'BEGIN {FS = ":.*##"} /^##@/ {printf "\n\033[1m%s\033[0m\n", substr($$0, 5)} \
		/^[a-z0-9-]+:.*##/ {printf "  \033[36m%-16s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: sync ## Cluster, images, operator, one fine-tune, one node killed in the middle, the adapter back: end to end.
	$(RUN) python -m hack.demo.demo

##@ Development
.PHONY: sync
sync:
	@$(UV) sync --frozen --quiet --all-packages

.PHONY: fmt
fmt: sync ## Format the code.
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

.PHONY: lint
lint: sync ## ruff, import rules, shellcheck.
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) lint-imports
	$(RUN) shellcheck $$(git ls-files '*.sh' .ci/run)

.PHONY: lint-chart
lint-chart: sync ## helm lint (builds helm once).
	$$($(CTL) path helm) lint charts/qlora-operator

.PHONY: typecheck
typecheck: sync ## mypy, strict.
	$(RUN) mypy --cache-dir $(CACHE)/mypy
	$(RUN) mypy --cache-dir $(CACHE)/mypy --explicit-package-bases --package hack

.PHONY: manifests
manifests: sync ## Generate the CRD from api/ into crds/ and the chart.
	$(RUN) python hack/manifests.py

.PHONY: verify
verify: sync ## Fail when a generated file drifts from its source.
	$(RUN) python hack/manifests.py --check
	$(UV) lock --check

##@ Tests
.PHONY: test
test: sync ## Everything: style, types, unit, integration, a few cells of the kill grid, e2e on a real local cluster.
	$(MAKE) lint typecheck verify lint-chart test-unit cluster-up images
	$(MAKE) --jobs 2 test-integration test-chaos-and-cluster  # side by side: 781 s instead of 944 on two cores
	$(RUN) pytest tests/e2e --ignore tests/e2e/cluster $(PYTEST_ARGS)

.PHONY: test-chaos-and-cluster
test-chaos-and-cluster:
	$(MAKE) --jobs 1 chaos-smoke $(if $(filter current,$(CLUSTER)),,test-cluster)  # those are about the local one

.PHONY: test-unit
test-unit: sync ## Pure code, in seconds.
	$(RUN) pytest $(PARALLEL) tests/unit $(PYTEST_ARGS)

.PHONY: test-integration
test-integration: sync ## Real API server, real S3 server, gloo processes.
	$(RUN) pytest $(PARALLEL) tests/integration $(PYTEST_ARGS)

.PHONY: test-e2e
test-e2e: cluster-up images ## The real cluster: every example, a killed node, bad input.
	$(RUN) pytest tests/e2e $(PYTEST_ARGS)

.PHONY: test-cluster
test-cluster: cluster-up images ## The local cluster itself: names, killed and cut nodes, dead daemons.
	$(RUN) pytest tests/e2e/cluster $(PYTEST_ARGS)

.PHONY: test-gpu
test-gpu: sync ## On a machine with GPUs: bytes, oracle, resume. CI has none.
	$(RUN) pytest tests/gpu $(PYTEST_ARGS)

.PHONY: chaos-smoke
chaos-smoke: sync ## Eight cells of the kill grid, always the same ones.
	$(RUN) python -m tests.chaos --cells 8 --seed 5

.PHONY: chaos-fast
chaos-fast: sync ## Kill grid without a cluster, under ten minutes; ends with one line of JSON.
	$(RUN) python -m tests.chaos --cells 36

.PHONY: chaos
chaos: sync ## 300 cells of the kill grid and 28 on the local cluster; ends with one line of JSON.
	$(RUN) python -m tests.chaos --cells 300 --cluster 28

.PHONY: chaos-poisson
chaos-poisson: sync ## Twenty minutes of random faults on the local cluster, one a minute: goodput and recovery.
	$(RUN) python -m tests.chaos.poisson

##@ Measurements
.PHONY: bench
bench: sync ## CPU: tokens a second and memory against TRL's SFTTrainer; ends with one line of JSON.
	$(RUN) python benchmarks/bench_cpu.py

.PHONY: bench-gpu
bench-gpu: sync ## Two GPUs: the table of benchmarks/results.md, references and ours in one run.
	$(RUN) python benchmarks/bench_gpu.py

##@ Cluster
.PHONY: cluster-up
cluster-up: sync ## Start the local Kubernetes (builds it once). CLUSTER=current REGISTRY=HOST/PATH uses the current kubectl context.
	$(CTL) up --nodes $(NODES)

.PHONY: cluster-down
cluster-down: sync ## Stop it and delete its S3, adapters included. KEEP=1 keeps S3, etcd and node disks for the next cluster-up.
	$(CTL) down $(if $(KEEP),--keep)

.PHONY: images
images: sync ## Build both images and load them into the cluster's nodes, or with CLUSTER=current push them to REGISTRY.
	$(CTL) images

.PHONY: install
install: sync ## Install the CRD alone.
	$(CTL) kubectl apply --server-side -f crds/

.PHONY: deploy
deploy: sync ## Install or upgrade the operator by its Helm chart; HELM_ARGS go to helm.
	$(CTL) deploy $(HELM_ARGS)

.PHONY: sample-data
sample-data: sync ## The examples' model and data into the bucket, their Secret into NAMESPACE (default): what kubectl apply -f examples/ needs.
	$(RUN) python -m hack.demo.upload --namespace $(NAMESPACE)

.PHONY: undeploy
undeploy: sync ## Remove the operator; the CRD and the runs stay.
	$(CTL) undeploy
