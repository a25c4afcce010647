# Everything here needs Python 3.11 or newer with venv, make and git; the first target that runs makes .venv.

PYTHON ?= python3
CPU_WHEELS := https://download.pytorch.org/whl/cpu
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
READY := .venv/minipar-is-set-up
FIRST := $(firstword $(wildcard chapters/*.ipynb))
LABFLAGS ?=

.PHONY: help setup lab test lint notebooks bench lock
.DELETE_ON_ERROR:

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## make .venv and install the pinned packages (the other targets do this by themselves)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "minipar needs Python 3.11 or newer and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Name a newer one: make setup PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "Installing the packages of requirements.lock into .venv. The first time this takes a few minutes."
	@# On Linux, torch from the usual index brings gigabytes of CUDA. Where no NVIDIA GPU is seen, take PyTorch's own
	@# CPU wheel. One short question, asked once, finds out whether its index can be reached from here.
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && [ ! -e /proc/driver/nvidia ] \
	   && $(BIN)/python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' \
	      $(CPU_WHEELS)/torch/ 2>/dev/null; \
	 then $(BIN)/python -m pip install -q --no-compile --no-deps --extra-index-url $(CPU_WHEELS) \
	      "$$(grep '^torch==' requirements.lock)"; fi
	@$(BIN)/python -m pip install -q --no-compile -r requirements.lock
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation --editable .
	@# Where Python may not write bytecode when it imports, each process would compile torch anew: do it once, here.
	@if [ -n "$$PYTHONDONTWRITEBYTECODE" ]; then $(BIN)/python -m compileall -q -j 0 .venv >/dev/null 2>&1 || true; fi
	@# A reader need not be asked for news of Jupyter's, nor a server for updates.
	@$(BIN)/python -m jupyter labextension disable --level=sys_prefix \
	  @jupyterlab/apputils-extension:announcements 2>/dev/null
	@touch $@

lab: $(READY)  ## open JupyterLab on the first chapter
	$(BIN)/python -m jupyterlab --ServerApp.ip=127.0.0.1 --LabApp.default_url=/lab/tree/$(FIRST) \
	  $(if $(filter 0,$(shell id -u)),--allow-root) $(LABFLAGS)

lint: $(READY)  ## check style and types
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

test: lint  ## run everything that CI runs
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/python -m pytest -n 2 --dist loadfile --nbval-lax --nbval-cell-timeout=90 chapters solutions

notebooks: $(READY)  ## build chapters, solutions and exercises from their sources
	$(BIN)/python -m minipar.course.build

bench: $(READY)  ## measure minipar beside torch's own and write benchmarks/results.json
	$(BIN)/python benchmarks/run.py

lock:  ## bring requirements.lock in line with pyproject.toml (needs uv; FLAGS=--upgrade takes newer versions)
	uv pip compile -q --universal --python-version 3.11 --extra course --extra weights --extra dev --no-annotate --no-header \
	  $(FLAGS) -o requirements.lock pyproject.toml
	@# torch asks for its own CUDA packages where it needs them; pinned here they would burden every Linux.
	grep -Ev '^(nvidia-|cuda-|triton)' requirements.lock > .venv/lock && mv .venv/lock requirements.lock
