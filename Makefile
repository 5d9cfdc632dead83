# Everything one does in this repository. `make` alone lists it.
#
# GNU make 3.81 (macOS) and a POSIX sh run it. What is installed goes to .venv, what is kept goes to var/ (DATA_DIR).

SHELL = /bin/sh
PYTHON_BIN = .venv/bin/python
MANAGE = $(PYTHON_BIN) manage.py
INSTALL = @sh requirements/install.sh

# What `make check` runs, in this order; each is a target of its own.
STEPS = format-check lint types contracts migrations-check test

# A setting of another project in the caller's shell is not meant for this one.
unexport DJANGO_SETTINGS_MODULE

.DEFAULT_GOAL = help
.PHONY: help install install-dev run test bench check format format-check lint types contracts migrations-check css lock

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

# Tests mostly wait for servers: more of them than processors run side by side, each file in one process, the longest first.
PARALLEL ?= -n 3 --dist loadfile --no-loadscope-reorder

install: ## make .venv and install what the service needs
	$(INSTALL) base

install-dev: ## the same, with what tests and checks need
	$(INSTALL) dev

run: install ## set everything up and serve on http://127.0.0.1:8000 (HOST and PORT change that)
	@$(MANAGE) migrate --verbosity 0
	@$(MANAGE) bootstrap
	@exec $(MANAGE) serve

test: install-dev ## set everything up and run the whole suite (ARGS="tests/proxy -k stream" runs a part)
	@$(PYTHON_BIN) -m pytest $(PARALLEL) $(ARGS)

bench: install ## what a request costs beside nginx: a quarter of an hour (ARGS=--quick: two minutes), figures in bench/results/
	@$(PYTHON_BIN) -m bench $(ARGS)

check: install-dev ## what must pass before a change goes in: format, lint, types, contracts, migrations, tests
	@began=$$(date +%s); times=; \
	for step in $(STEPS); do \
		started=$$(date +%s); \
		echo "--- $$step"; \
		$(MAKE) --no-print-directory $$step || { echo "make check: '$$step' failed; 'make $$step' runs it alone." >&2; exit 1; }; \
		times="$$times  $$step $$(($$(date +%s) - started)) s"; \
	done; \
	echo "make check: all passed in $$(($$(date +%s) - began)) s: $$times"

format: install-dev ## put code and templates into their form
	@$(PYTHON_BIN) -m ruff format .
	@$(PYTHON_BIN) -m ruff check --fix --exit-zero --quiet .
	@find templates -name '*.html' -exec .venv/bin/djade {} +

format-check: install-dev
	@$(PYTHON_BIN) -m ruff format --check .
	@find templates -name '*.html' -exec .venv/bin/djade --check {} +

lint: install-dev ## ruff
	@$(PYTHON_BIN) -m ruff check .

types: install-dev ## mypy, strict
	@$(PYTHON_BIN) -m mypy

contracts: install-dev ## which module may import which (.importlinter)
	@.venv/bin/lint-imports

migrations-check: install-dev ## the models and their migrations agree
	@DJANGO_SETTINGS_MODULE=tests.settings $(MANAGE) makemigrations --check --dry-run

css: ## build static/sluice/sluice.css again; only this needs Node, and the result is committed
	@npm ci --silent --no-progress
	@npm run --silent css

lock: install-dev ## compile requirements/*.in into hashed *.txt again
	@for name in base dev prod; do \
		(cd requirements && ../.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
			$$name.in -o $$name.txt --no-emit-index-url --no-emit-find-links) || exit 1; \
	done
