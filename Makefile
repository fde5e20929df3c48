# One command per need; CI calls the same ones.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
READY := $(VENV)/.ready
BENCHES := speculation layer_parallel trees pipeline startup scheduler serve kv kv_faults disaggregation overload soak chaos gpu

.PHONY: setup demo test check audit bench proto clean

setup: $(READY)

# torch first and by its exact version: whatever else wants torch then finds it there. DeepSpeed builds against it.
$(READY): constraints.txt pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch numpy setuptools wheel ninja packaging hatchling editables
	$(PIP) install -c constraints.txt psutil py-cpuinfo einops hjson msgpack tqdm pydantic
	$(PIP) install -c constraints.txt --no-build-isolation deepspeed
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PY) -m paceline.parallel.collectives
	$(PY) -m paceline.runtime.layers.cpu_kernels
	$(PY) -m paceline.runtime.transfer.kernels
	touch $@

# float32, so that the texts can be compared token by token: see the README on near-ties in bfloat16
demo: setup
	$(VENV)/bin/paceline generate --compare --dtype float32 --max-tokens 96 --max-num-seqs 1 --prompts-file deploy/configs/demo-prompts.jsonl

# first what starts clusters and looks whether they leave anything, alone; then all the rest, two files at a time
test: setup
	$(PY) -m pytest tests/ray tests/ranks tests/gpu
	$(PY) -m pytest -n 2 --dist loadfile tests/pure tests/cpu tests/packaging

# within a minute; where no vulnerability service can be reached it says so and passes
audit: setup
	$(PY) .ci/audit.py

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: setup
	for name in $(BENCHES); do $(PY) -m benchmarks.$$name --output benchmarks/results/$$name.json || exit 1; done

# inside .src, so that generated code imports its neighbours as paceline.proto
proto: setup
	cd .src && ../$(PY) -m grpc_tools.protoc -I . --python_out=. --pyi_out=. paceline/proto/*.proto

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
