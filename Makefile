PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ROOT ?= runs/demo

# As in dmd2/__init__.py, for what imports torch before it.
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 1000
endif

.DEFAULT_GOAL := help
.PHONY: help demo demo-page demo-sdxl teacher-emoji test test-slow test-cluster test-images test-durations test-oldest lock check format lint types compile manifests images images-lock images-push sbom scan submit-sdxl schedule unschedule bench bench-ablation bench-data bench-sdxl bench-memory bench-engine bench-evaluation bench-gpu clean

help: ## Show this list
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(READY) ## Distil a digit teacher, end to end, on this machine (ROOT=runs/demo)
	$(BIN)/python -m pipelines run-local --root $(ROOT) --overrides evaluate.metrics=fid,kid,precision,recall
	test ! -d $(ROOT)/package || $(BIN)/dmd2 verify $(ROOT)/package

# What there is of the demos, or a folder that is refused by name.
SERVED = $(or $(wildcard $(ROOT)/package runs/demo-sdxl/package),$(ROOT)/package)

demo-page: $(READY) ## Draw with the students of `make demo` and `make demo-sdxl` beside their teachers, in a browser (PORT=7860)
	$(BIN)/dmd2 serve $(SERVED) --teachers $(wildcard $(SERVED:package=teacher)) $(if $(PORT),--port $(PORT))

EMOJI := runs/emoji
SDXL_ROOT := runs/demo-sdxl
TEACHER ?= tests/emoji/pipeline

demo-sdxl: $(READY) $(EMOJI)/source ## Distil a small SDXL that draws emoji into four steps (needs npm)
	$(BIN)/python -m pipelines run-local --root $(SDXL_ROOT) --source $(EMOJI)/source --teacher $(TEACHER) --recipe sdxl-4step-emoji --low-rank 16 \
		--overrides "evaluate.metrics=fid,kid,precision,recall,clip evaluate.clip=tests/emoji/clip_model"
	test ! -d $(SDXL_ROOT)/package || $(BIN)/dmd2 verify $(SDXL_ROOT)/package

teacher-emoji: $(READY) $(EMOJI)/source ## Train that SDXL anew, into runs/emoji/teacher: about half an hour
	$(BIN)/dmd2 shard sdxl-4step-emoji --source $(EMOJI)/source --out $(EMOJI)/shards
	$(BIN)/python -m tests.emoji.teacher --data $(EMOJI)/shards --out $(EMOJI)/teacher

$(EMOJI)/source: $(READY)
	$(BIN)/python -m tests.emoji.source --out $@

JOBS ?= 3

test: $(READY) ## Run the tests (JOBS=3 files at a time, on two cores: a third of their time is waiting)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

test-slow: $(READY) ## Repeat what is random, with real processes only; build and run the small image (as root)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m slow

test-cluster: $(READY) ## Distil on two nodes on the real servers of Kubernetes, Trainer and Kueue (as root; needs Go: `python -m tests.cluster.bed build`)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m cluster tests/cluster

test-images: $(READY) ## Build both images and run the stages in them (as root): 17 GB of disk
	DMD2_TEST_DMD2=build $(BIN)/pytest -m slow tests/images

test-durations: $(READY) ## Write what each file of tests takes to tests/durations.json, by which they are ordered
	OMP_NUM_THREADS=1 $(BIN)/pytest --record-durations

CORE = tests $(addprefix --ignore tests/,pipelines images manifests components cluster evaluation/test_new_metric.py)

# The rules of `.venv`, for another: on pyenv's Python 3.12 where no other is found, from pins that no export makes.
PYTHON312 ?= $(shell for python in python3.12 $(HOME)/.pyenv/versions/3.12.*/bin/python; do $$python -c '' 2>&- && echo $$python && break; done)

test-oldest: ## Run the core tests on Python 3.12 with the oldest versions of what the library needs (PYTHON312=)
	$(MAKE) test VENV=.venv-oldest PYTHON='$(or $(PYTHON312),python3.12)' LOCK=tests/oldest.txt TESTS='$(CORE)'

# The index whose addresses a lock may name: others cannot reach a mirror of this machine.
PUBLIC := https://pypi.org/simple

lock: $(READY) ## Pin the dependencies anew: all, the oldest, those of the images
	$(UV) lock --default-index $(PUBLIC)
	$(UV) pip compile --quiet --default-index $(PUBLIC) pyproject.toml --extra demo --extra serve --extra dev --resolution lowest-direct --python-version 3.12 --no-header --no-annotate --output-file tests/oldest.txt
	$(BIN)/python -m images lock --no-base

check: lint types test ## Everything that must pass before a commit lands

format: $(READY) ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY) ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## Check the types
	$(BIN)/mypy

compile: $(READY) ## Compile the pipelines to pipelines/compiled/*.yaml, and components/README.md
	$(BIN)/python -m pipelines compile

# What a run is given: these variables, TEACHER and RUN_ROOT; HOST is the address of the pipelines' UI.
PARAMETERS = SOURCE OVERRIDES FIRST_OVERRIDES START PROMPTS PAIRS BASE VAE LICENSE LICENSE_LINK RESTRICTIONS SAFETY_CHECKER LOW_RANK DESTINATION HUB MODEL_REGISTRY SCORES GATE GPUS NODES POOL QUEUE ACCOUNT COST_CENTRE BUDGET PARTS
flag = $(subst _,-,$(shell echo $(1) | tr A-Z a-z))
quote = '$(subst ','\'',$(1))'
GIVEN = $(foreach name,$(PARAMETERS),$(if $($(name)),--$(call flag,$(name)) $(call quote,$($(name))))) $(if $(RUN_ROOT),--root '$(RUN_ROOT)')
HOW = $(if $(HOST),--host '$(HOST)') $(if $(DRY_RUN),--dry-run) $(if $(UNPINNED),--unpinned)
PRICED = $(if $(PRICE),--price $(PRICE)) $(if $(WAIT),--wait)
SDXL ?= stabilityai/stable-diffusion-xl-base-1.0

submit-sdxl: $(READY) ## Distil SDXL into four steps on a cluster (SOURCE=gs://..., HOST=..., DRY_RUN=1, PRICE=, WAIT=1)
	$(BIN)/python -m pipelines submit --recipe sdxl-4step --teacher '$(if $(filter command environment,$(origin TEACHER)),$(TEACHER),$(SDXL))' $(GIVEN) $(HOW) $(PRICED)

submit-%: $(READY) ## Run any other recipe there: submit-sd15-1step, ...
	$(BIN)/python -m pipelines submit --recipe $* $(if $(filter command environment,$(origin TEACHER)),--teacher '$(TEACHER)') $(GIVEN) $(HOW) $(PRICED)

schedule: $(READY) ## Look for new teachers every week (TEACHERS=, LEDGER=, RUN_ROOT=, SETTINGS='{...}', CRON=, HOST=)
	$(BIN)/python -m pipelines schedule --teachers '$(TEACHERS)' --ledger '$(LEDGER)' --root '$(RUN_ROOT)' --settings '$(or $(SETTINGS),{})' --account '$(or $(ACCOUNT),watcher)' --service-account '$(or $(RUNS_ACCOUNT),steps)' $(if $(GPU_HOURS),--gpu-hours $(GPU_HOURS)) $(if $(CRON),--cron '$(CRON)') $(HOW)

unschedule: $(READY) ## Look no more
	$(BIN)/python -m pipelines unschedule $(if $(HOST),--host '$(HOST)')

manifests: $(READY) ## Render the manifests of every overlay, or of OVERLAY=, to runs/manifests/<overlay>.yaml (TAGS=1: without digests too)
	$(BIN)/python -m manifests render $(if $(OVERLAY),--overlay $(OVERLAY)) $(if $(TAGS),--tags)

BUILT = $(if $(BUILDER),--builder '$(BUILDER)')

images: $(READY) ## Build the images (BASE=, INDEX=, WHEELS=, BUILDER=)
	$(BIN)/python -m images build $(if $(BASE),--base '$(BASE)') $(if $(INDEX),--index '$(INDEX)') $(if $(WHEELS),--wheels '$(WHEELS)') $(BUILT)

images-push: $(READY) ## Send them to a registry, sign them, and note their digests in images/images.lock (REGISTRY=, KEY=, UNSIGNED=1)
	$(BIN)/python -m images push --registry '$(REGISTRY)' $(BUILT) $(if $(KEY),--key '$(KEY)') $(if $(UNSIGNED),--unsigned)

images-lock: $(READY) ## Pin what the images are built of, and the images of others in the manifests
	$(BIN)/python -m images lock

sbom: $(READY) ## Write the packages of each image to runs/sbom/<image>.cdx.json (CycloneDX)
	$(BIN)/python -m images sbom

scan: $(READY) ## Look up the packages of uv.lock in a database of vulnerabilities (SERVICE= a mirror of api.osv.dev)
	$(BIN)/python -m images scan $(if $(SERVICE),--service '$(SERVICE)')

bench: bench-data bench-ablation bench-sdxl bench-memory bench-engine bench-evaluation ## All benchmarks

bench-ablation: $(READY) ## The ablation of the paper on digits: 3 variants x 3 seeds, about half an hour
	$(BIN)/python -m tests.bench.ablation

bench-data: $(READY) ## Sharding and reading against plain webdataset, and at 1,000,000 units and shards, ten minutes (needs npm)
	$(BIN)/python -m tests.bench.data
	$(BIN)/python -m tests.bench.scale

bench-sdxl: $(READY) ## Four text-to-image recipes on the emoji teacher, an hour and a half (needs npm)
	$(BIN)/python -m tests.bench.sdxl --teacher $(TEACHER)

bench-memory: $(READY) ## A step on a U-Net of the size of Stable Diffusion 1.5: seconds and peak memory
	$(BIN)/python -m tests.bench.memory

bench-engine: $(READY) ## Steps against a plain loop, messages of SDXL on 8 and 64 processes, memory against the plan: about half an hour
	$(BIN)/python -m tests.bench.engine
	$(BIN)/python -m tests.bench.collectives
	$(BIN)/python -m tests.bench.peaks
	$(BIN)/python -m tests.bench.plan

bench-gpu: $(READY) ## On a GPU: seconds, memory and kernels of each training, 8 minutes a call (docs/measured)
	$(BIN)/python -m tests.bench.gpu

bench-evaluation: $(READY) ## Evaluation: FID against clean-fid, memory at 1,024 pixels, two processes: an hour (needs npm)
	$(BIN)/python -m tests.bench.evaluation

clean: ## Remove what runs have made; the environment stays
	rm -rf runs local_outputs .pytest_cache .mypy_cache .ruff_cache

# uv knows nothing of pip's settings, and `uv sync` downloads from the addresses that the lock names. An export names none: so
# what the lock pins, by hash, comes from the index that this machine gives pip.
UV = UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=1 \
	UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX-$$($(BIN)/pip config list | sed -n "s/.*\.index-url='\(.*\)'/\1/p" | head -1)}" $(BIN)/uv
INTO = --quiet --python $(BIN)/python --no-build-isolation
LOCK := uv.lock
PINS = $(VENV)/requirements.txt
EXPORT = $(UV) export --quiet --frozen --all-extras --group build --no-emit-project --output-file $(PINS)

# Where Python may not write the bytecode of what it imports, it is written now, or each start would compile anew. The last
# line finds what the lock has no package for, as on another platform.
$(READY): $(LOCK) pyproject.toml images/build.lock
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r images/build.lock
	@$(if $(filter uv.lock,$(LOCK)),$(EXPORT),cp $(LOCK) $(PINS))
	@$(UV) pip sync $(INTO) $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode) $(PINS)
	@$(UV) pip install $(INTO) --no-deps --editable .
	@$(UV) pip check --quiet --python $(BIN)/python
	@touch $@
