# chatd: `make` lists what there is. PYTHON names the interpreter for .venv, ARGS goes to pytest, the faults and the benchmarks.

PYTHON ?= python3
ARGS ?=
# Another interpreter has an environment of its own: .venv-python3.13 beside .venv.
VENV := .venv$(addprefix -,$(filter-out python3,$(notdir $(PYTHON))))
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help run tour test test-quick test-systemd check outdated docs reference install uninstall format bench bench-quick faults clean

# A .venv whose interpreter has gone (the system's Python was upgraded) is made anew.
$(if $(shell $(BIN)/python -c "print('fine')" 2>/dev/null),,$(shell rm -f $(VENV)/run $(VENV)/docs $(VENV)/dev))

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

run: $(VENV)/run  ## the demo, on this machine alone: installs into .venv and serves
	@exec $(BIN)/chatd serve --demo

tour: $(VENV)/dev  ## three users go through every event and every route, and print it (ARGS=two: on two nodes)
	@sh tests/install.sh
	@$(BIN)/python -m tests.tour $(ARGS)

test: $(VENV)/dev  ## all tests; installs Redis, PostgreSQL, nginx and Chromium where they are missing
	@sh tests/install.sh
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-quick: $(VENV)/dev  ## the tests that start no other process, in a minute: for use during development
	@$(BIN)/python -m pytest -n 2 -m "not service and not slow" $(ARGS)

test-systemd: $(VENV)/dev  ## chatd as a service of the real systemd, booted for it: as root, a minute or two
	@sh tests/install.sh
	@CHATD_TEST_SYSTEMD=1 $(BIN)/python -m pytest -p no:cacheprovider tests/booted $(ARGS)

check: $(VENV)/dev  ## lint, format, types, which module may import which, and how exposed the units are
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict chatd
	$(BIN)/lint-imports
	sh tests/units.sh

outdated: $(VENV)/dev  ## which requirements have newer releases, and which are held on purpose: asks PyPI
	@$(BIN)/python -m tools.outdated

docs: $(VENV)/docs  ## the documentation as a searchable site in site/, with its links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/ is made. Look at it: $(BIN)/python -m http.server --directory site --bind 127.0.0.1 8000"

reference: $(VENV)/run  ## write what is generated from the code: chatd.toml, and parts of docs/
	$(BIN)/python -m tools.reference

install:  ## as a systemd service, or an upgrade of one: as root (PYTHON=/usr/bin/python3.12: with another Python)
	@$(if $(filter-out python3,$(PYTHON)),PYTHON=$(PYTHON)) sh systemd/install.sh

uninstall:  ## the service and its files; configuration, secrets and data stay
	@sh systemd/uninstall.sh

format: $(VENV)/dev  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

faults: $(VENV)/dev  ## break what can break under load, for 40 minutes, and check the guarantees
	@sh tests/install.sh
	@$(BIN)/python -m tests.faults $(or $(ARGS),--pairs 6)

bench: $(VENV)/dev  ## measure all goals, and the peers (other servers, which it installs into .bench): half an hour
	@sh tests/install.sh
	@$(BIN)/python -m benchmarks $(or $(ARGS),goals)

bench-quick: $(VENV)/dev  ## the goals A to E only, in three minutes, compared with bare write() and the websockets library
	@sh tests/install.sh
	@$(BIN)/python -m benchmarks goals --quick $(ARGS)

clean:  ## remove .venv and all caches; databases stay
	rm -rf .venv .venv-* .bench build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: installed with what `run` needs, what the docs need on top, and what the checks need. The package itself is
# editable, so that only pyproject.toml asks for another installation, never a change of the code.
$(VENV)/run: pyproject.toml
	$(call install,.)

$(VENV)/docs: pyproject.toml
	$(call install,.[docs])
	@touch $(VENV)/run

$(VENV)/dev: pyproject.toml
	$(call install,.[dev])
	@touch $(VENV)/run $(VENV)/docs

define install
@set -e; \
if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "chatd needs Python 3.11 or newer, which $(PYTHON) is not. Name another: make PYTHON=python3.12 …" >&2; \
		exit 1; \
	}; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || sh tests/install.sh python3-venv; \
	echo "Making $(VENV) with $$($(PYTHON) --version) …"; \
	$(PYTHON) -m venv --clear $(VENV); \
fi; \
echo "Installing chatd and its libraries into $(VENV), about a minute the first time …"; \
$(BIN)/python -m pip install --disable-pip-version-check --no-input --editable '$(1)'; \
touch $@
endef
