# Everything a stranger needs is `make demo` or `make test`. Needs Python 3.11 or newer with venv, git and make.
#
# The environment is made once. Its stamp carries a digest of the lock, of pyproject.toml and of this folder's place,
# so that a second run installs nothing and needs no network, and a changed lock installs again.

PYTHON  ?= python3
UV      ?= uv
MINUTES ?= 60
JOBS    ?= 3

VENV  := .venv
PY    := $(VENV)/bin/python
PIP   := $(PY) -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.installed-$(shell { pwd; cat requirements.lock pyproject.toml; } | cksum | cut -d' ' -f1)

# What is checked: every source root and document that is there.
SOURCES  := $(wildcard mist brokers tests bench scripts)
TEXTS    := $(wildcard mist brokers tests bench scripts compose Dockerfile docs README.md CHANGELOG.md Makefile .ci)
ADAPTERS := $(notdir $(patsubst %/__init__.py,%,$(wildcard brokers/*/__init__.py)))

# Where this is set, every one of the hundreds of processes that the tests and the demo start compiles MIST anew: half of
# their processor time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test check conform campaign-ci campaign power-cut bench docs fmt lock clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1\t\2/p' Makefile | awk -F'\t' '{ printf "  make %-12s %s\n", $$1, $$2 }'

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "MIST needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV) from requirements.lock"
	@$(PIP) install --require-hashes -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.installed-*
	@touch $@

install: $(STAMP)  ## make .venv and install what requirements.lock says

demo: $(STAMP)  ## the main job end to end, about 30 s; BROKER=nats or redis starts and kills a real server too
	@$(VENV)/bin/mist demo $(if $(filter-out log,$(BROKER)),--server $(BROKER)) $(ARGS)

test: $(STAMP)  ## the tests, five to six minutes on two cores
	@$(PY) -m pytest -q -n $(JOBS) --ignore=tests/campaigns tests $(ARGS)

check: $(STAMP)  ## ruff, mypy --strict, import contracts, spelling, dead links
	@$(PY) -m ruff check $(SOURCES)
	@$(PY) -m ruff format --check $(SOURCES)
	@MYPYPATH=brokers $(PY) -m mypy $(addprefix -p ,mist $(ADAPTERS))
	@$(PY) $(VENV)/bin/lint-imports --no-logo
	@$(PY) $(VENV)/bin/codespell $(TEXTS)
	@$(PY) scripts/check_links.py

conform: $(STAMP)  ## the conformance suites over every broker and transport
	@MIST_CONFORM_ALL=1 $(PY) -m pytest -q -n $(JOBS) tests/conformance $(ARGS)

campaign-ci: $(STAMP)  ## the fault campaigns in their small sizes
	$(if $(wildcard tests/campaigns/test_*.py),@MIST_CAMPAIGN=ci $(PY) -m pytest -q -n 2 --dist worksteal tests/campaigns $(ARGS),@echo "tests/campaigns holds no campaign yet")

campaign: $(STAMP)  ## the fault campaigns for MINUTES=60, resumable, prints what it reached
	@$(PY) -m tests.campaigns.run --minutes $(MINUTES) $(ARGS)

power-cut: $(STAMP)  ## what a power cut takes from every backend (root, loop devices)
	@$(PY) -m tests.campaigns.power $(ARGS)

bench: $(STAMP)  ## speed, interleaved with the peers in the same run
	@$(PY) -m bench $(ARGS)

compose-test: $(STAMP)  ## compose/ for real, if a Docker engine answers (ARGS=--own-engine starts one as root)
	@$(PY) scripts/compose_test.py $(ARGS)

docs: $(STAMP)  ## check the documents: links, anchors, and every code block and command that runs
	@$(PY) scripts/check_links.py
	$(if $(wildcard tests/docs/test_*.py),@$(PY) -m pytest -q tests/docs $(ARGS))

fmt: $(STAMP)  ## format and fix what can be fixed
	@$(PY) -m ruff check --fix $(SOURCES)
	@$(PY) -m ruff format $(SOURCES)

# Universal over Python 3.11 to 3.13 and all platforms; hashes, and neither hosts nor index lines nor local paths.
lock:  ## write requirements.lock anew (needs uv)
	$(UV) pip compile pyproject.toml --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	  --extra all --group dev \
	  --no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" -o requirements.lock

clean:  ## remove the environment, caches and builds
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find mist $(wildcard brokers tests bench scripts) -name __pycache__ -type d -prune -exec rm -rf {} +
