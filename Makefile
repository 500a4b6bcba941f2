# `make demo` and `make test` set everything up by themselves, in .venv, and then run. A stamp per
# step makes the second run quick.

PYTHON ?= $(firstword $(foreach v,3.11 3.12,$(shell command -v python$(v))) python3)
# lite: MMCV's wheel without compiled operators, with mmlite in their place. compiled: its own.
MMCV ?= lite
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint requirements/constraints.txt
say = @printf '\n==> %s\n' "$(1)"

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint docs wheels test-wheels matrix clean

help:
	@echo 'make demo         set up, then train and evaluate a small Lite-DINO (options: ARGS="--epochs 5")'
	@echo 'make test         set up, then run the tests (options: ARGS="-k schedule")'
	@echo 'make setup        only set up $(VENV) (options: PYTHON=python3.12 MMCV=compiled)'
	@echo 'make lint         ruff, mypy, directions of imports and lines of every room'
	@echo 'make docs         build the documentation in site/'
	@echo 'make wheels       build the wheels of every system in wheelhouse/ (one: ARGS=linux-x86_64)'
	@echo 'make test-wheels  test the one for this machine in clean environments (one: ARGS="-p 3.12")'
	@echo 'make matrix       test every supported set of versions (hours; ARGS="-l" lists them)'
	@echo 'make clean        remove the environments and what was built'

demo: setup
	$(call say,mmlite demo)
	@$(BIN)/mmlite demo $(ARGS)

# A process for each core, up to four, and each of them does whole files, whose tests share what is
# slow to make; ARGS="-n 0" is one process for all. One that crashes ends the tests: pytest-xdist
# can wait for ever for the process that it starts in its place.
test: setup
	$(call say,Tests)
	@$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile \
		--max-worker-restart 0 $(ARGS)

lint: setup
	$(call say,ruff)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	$(call say,mypy)
	@$(BIN)/mypy
	$(call say,Imports and lines of every room)
	@$(BIN)/lint-imports
	@# The minus goes once every room fits its budget: until then the table is for reading.
	-@$(BIN)/python tools/budget.py

# The API reference is made from the sources as text: neither torch nor MMDetection is needed, and
# what mkdocs needs cannot go where openxlab of openmim pins requests.
docs: $(VENV)-docs/.ready
	$(call say,Documentation)
	@NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

wheels: $(VENV)-wheels/.ready
	$(call say,Wheels)
	@$(VENV)-wheels/bin/python tools/wheels.py $(ARGS)

# Where pyenv keeps the interpreters, its python3.12 works only if this variable names one.
NOX := PYENV_VERSION="$$(pyenv versions --bare 2>/dev/null | paste -sd :)" $(VENV)-nox/bin/nox

test-wheels: $(VENV)-nox/.ready
	@$(NOX) --session wheel commands $(ARGS)

matrix: $(VENV)-nox/.ready
	@$(NOX) $(ARGS)

$(VENV)-%/.ready: requirements/%.txt
	$(call say,A virtual environment in $(@D) with $(PYTHON))
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --disable-pip-version-check --quiet --requirement $<
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs $(VENV)-wheels $(VENV)-nox .nox build site wheelhouse mmlite/ops/libmmlite_cpu.*

setup: $(VENV)/.mmlite

$(VENV)/.venv:
	$(call say,1/5 A virtual environment in $(VENV) with $(PYTHON))
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else \
	  f"The pinned versions are for Python 3.11 and 3.12, and this is {sys.version.split()[0]}: \
	  choose one with make PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first: everything compiled after it is compiled against it.
$(VENV)/.torch: $(VENV)/.venv requirements/constraints.txt
	$(call say,2/5 PyTorch)
	@$(PIP) torch
	@touch $@

# openmim asks for setuptools 60 (through openxlab) but runs with later ones; what imports
# pkg_resources finds it up to 79. So 79 goes in after openmim, and pip's remark on it can be ignored.
# NNCF asks for a later rich than openxlab pins, and for scikit-learn, which it does without here.
$(VENV)/.stack: $(VENV)/.torch requirements/dev.txt
	$(call say,3/5 MMDetection with mim and the tools)
	@$(PIP) --requirement requirements/dev.txt
	@$(PIP) --no-deps nncf
	@$(BIN)/python -m pip install --disable-pip-version-check 'setuptools==79.0.1'
	@touch $@

# Both install the package mmcv, so one has to go before the other comes.
$(VENV)/.mmcv-lite: $(VENV)/.stack
	$(call say,4/5 MMCV without compiled operators: mmlite stands in for them)
	@$(BIN)/python -m pip uninstall --quiet --yes mmcv
	@$(PIP) mmcv-lite
	@rm -f $(VENV)/.mmcv-compiled
	@touch $@

$(VENV)/.mmcv-compiled: $(VENV)/.stack
	$(call say,4/5 MMCV with its operators (compiled here unless pip finds a wheel: 8 minutes on 2 quiet cores))
	@$(BIN)/python -m pip uninstall --quiet --yes mmcv-lite
	@MMCV_WITH_OPS=1 $(PIP) --no-build-isolation --progress-bar on mmcv
	@$(BIN)/python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("mmcv._ext").origin.endswith(".so"))'
	@rm -f $(VENV)/.mmcv-lite
	@touch $@

$(VENV)/.mmlite: pyproject.toml $(wildcard CMakeLists.txt mmlite/ops/csrc/*) | $(VENV)/.mmcv-$(MMCV)
	$(call say,5/5 mmlite with its CPU kernels (compiled here: about a minute))
	@$(PIP) --quiet --no-build-isolation --editable .
	@touch $@
