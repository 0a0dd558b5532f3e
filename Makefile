# make demo | app | test | coverage | lint | bench | gpu | soak | docs | clean.  Each sets up .venv where that is not done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VIDEOS ?=
STAMP := $(VENV)/.installed

.PHONY: setup demo app test coverage lint bench gpu soak docs clean

setup: $(STAMP)

# pip finds the pinned torch where a CPU build lies at hand; the constraints keep every other package to what was tested.
$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/lvdm demo $(if $(VIDEOS),--videos "$(VIDEOS)")

# The weights that the demo left, or those that ship; PIPELINE=folder for others.
PIPELINE ?= $(patsubst %/model_index.json,%,$(wildcard outputs/demo/pipeline/model_index.json))

app: $(STAMP)
	$(BIN)/lvdm-app $(if $(PIPELINE),--pipeline "$(PIPELINE)")

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadgroup

coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadgroup --cov

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/rollout.py

gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

soak: $(STAMP)
	$(BIN)/python -m pytest -m slow

docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) outputs site .coverage* .pytest_cache .mypy_cache .ruff_cache *.egg-info
