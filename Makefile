# make demo | app | test | coverage | lint | bench | gpu | soak | docs | clean.  Each sets up .venv where that is not done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VIDEOS ?=
STAMP := $(VENV)/.installed

.PHONY: setup demo app test coverage lint bench gpu soak docs clean

setup: $(STAMP)

# The build of torch: cuda is PyPI's for Linux; another one (cpu, cu126 ...) is that of download.pytorch.org/whl/NAME, unless pip
# finds it where it is configured to look; plain is what pip finds. `===` takes no other build: pip prefers "+cpu" to none.
TORCH ?= $(if $(filter Linux,$(shell uname)),$(if $(wildcard /dev/nvidiactl)$(shell command -v nvidia-smi),cuda,cpu),plain)
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_BUILD := torch===$(TORCH_VERSION)$(if $(filter-out cuda,$(TORCH)),+$(TORCH))
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

# The constraints keep every package to what was tested. pip would compile on one core, and Python itself not at all where
# PYTHONDONTWRITEBYTECODE is set: then each process would spend 15 seconds on what it imports.
$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(TORCH),cuda)
	$(PIP) $(TORCH_BUILD)
else ifneq ($(TORCH),plain)
	$(PIP) $(TORCH_BUILD) 2>/dev/null || $(PIP) --extra-index-url https://download.pytorch.org/whl/$(TORCH) $(TORCH_BUILD) \
		|| echo "No $(TORCH) build of torch $(TORCH_VERSION) was found; installing PyPI's, which brings CUDA."
endif
	$(PIP) -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib odvae lvdm app || true
	touch $@

demo: $(STAMP)
	$(BIN)/lvdm demo $(if $(VIDEOS),--videos "$(VIDEOS)")

# The weights that the demo left, or those that ship; PIPELINE=folder for others.
PIPELINE ?= $(patsubst %/model_index.json,%,$(wildcard outputs/demo/pipeline/model_index.json))

app: $(STAMP)
	$(BIN)/lvdm-app $(if $(PIPELINE),--pipeline "$(PIPELINE)")

# Three processes on two cores: tests wait for servers, browsers and other processes.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 3 --dist loadgroup

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
	$(PIP) -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) outputs site .coverage* .pytest_cache .mypy_cache .ruff_cache *.egg-info
