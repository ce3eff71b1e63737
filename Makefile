# `make` alone lists what there is.
.DEFAULT_GOAL := help
SHELL := /bin/bash
DISTRO ?= trixie
SCENARIO ?= default
export DISTRO
# `make new-app PATH=../shop`: on the command line it is an app, and the commands are found where every system has them.
ifeq ($(origin PATH),command line)
APP := $(PATH)
override PATH := /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
endif
override export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Where it is set, as in many containers, every ansible-playbook would compile Ansible anew: seconds each time.
export PYTHONDONTWRITEBYTECODE :=

APP_VENV := .cache/app-venv
SHELL_SCRIPTS = $(shell git grep -lE '^#!/(usr/bin/env bash|bin/(ba)?sh)' -- ':!*.j2' ':!*.md')

.PHONY: help
help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo:  ## Boot a throwaway host, provision it, post an event over TLS; DISTRO=bookworm or trixie
	@python3 scripts/demo.py up --distribution $(DISTRO)

.PHONY: demo-host
demo-host:  ## The demo up to the point where `ansible-playbook -i inventory/demo site.yml` can run
	@python3 scripts/demo.py host --distribution $(DISTRO)

.PHONY: demo-down
demo-down:  ## Remove all of the demo
	@python3 scripts/demo.py down

.PHONY: test
test: venv  ## check, scenario default on both distributions, the others on Debian 13 without their exhaustive tests; about an hour
	@scripts/packages test
	@python3 scripts/test.py

.PHONY: test-all
test-all: venv  ## The same, with every test of every scenario on both distributions; hours
	@scripts/packages test
	@python3 scripts/test.py --everywhere

.PHONY: scenario
scenario: venv  ## One scenario: make scenario SCENARIO=default DISTRO=bookworm
	@scripts/packages demo
	molecule test --scenario-name $(SCENARIO)

.PHONY: check
check: venv app-venv packages  ## Lint, types, secret scan, unit and policy tests; no container
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target --keep-going lint types secrets unit

.PHONY: lint
lint: lint-ansible lint-yaml lint-python lint-shell  ## All linters

.PHONY: lint-ansible
lint-ansible: venv
	ansible-lint --profile production --offline -q

.PHONY: lint-yaml
lint-yaml: venv
	yamllint --strict .

.PHONY: lint-python
lint-python: venv app-venv
	ruff check .
	ruff format --check .
	cd app && ../$(APP_VENV)/bin/ruff check . && ../$(APP_VENV)/bin/ruff format --check .

.PHONY: lint-shell
lint-shell: packages
	shellcheck $(SHELL_SCRIPTS)

.PHONY: types
types: venv app-venv  ## mypy, strict
	mypy
	cd app && ../$(APP_VENV)/bin/mypy
	cd app && ../$(APP_VENV)/bin/mypy ../roles/app/files/forge_worker.py

.PHONY: secrets
secrets: venv  ## Scan the files under version control for secrets
	git ls-files -z | xargs -0 --max-procs=2 --max-args=120 detect-secrets-hook --baseline .secrets.baseline

.PHONY: unit
unit: unit-project unit-app  ## Tests that need no host; they start servers of their own on free ports

.PHONY: unit-project
unit-project: venv app-venv packages
	pytest tests

.PHONY: unit-app
unit-app: app-venv packages
	cd app && ../$(APP_VENV)/bin/python -m pytest

.PHONY: packages
packages:
	@scripts/packages check

.PHONY: venv
venv:  ## Make .venv from requirements.txt
	@scripts/packages venv
	@scripts/venv

.PHONY: app-venv
app-venv: venv
	@scripts/venv app/requirements-dev.txt $(APP_VENV)

.PHONY: inspect
inspect: venv  ## Will an app run here, and what has to be done first? make inspect PATH=../shop
	@test -n '$(APP)' || { echo 'Name the app: make $@ PATH=../shop' >&2; exit 2; }
	@scripts/forgectl inspect $(if $(MODULE),--module '$(MODULE)') -- '$(APP)'

.PHONY: new-app
new-app: venv  ## Write the entry of a new app: make new-app PATH=../shop [NAME=shop] [INVENTORY=inventory/production]
	@test -n '$(APP)' || { echo 'Name the app: make $@ PATH=../shop' >&2; exit 2; }
	@python scripts/new_app.py $(if $(NAME),--name '$(NAME)') $(if $(MODULE),--module '$(MODULE)') \
	    $(if $(INVENTORY),--inventory '$(INVENTORY)') -- '$(APP)'

.PHONY: bench
bench: venv  ## Releases under load and throughput beside a peer, as ratios; writes docs/benchmarks.md. BENCH=--help tells more
	@scripts/packages demo
	@scripts/venv scripts/bench/requirements.txt .cache/bench-venv
	@PYTHONPATH=scripts:molecule/shared/testing python -m bench $(BENCH)

.PHONY: judges
judges: venv  ## sslyze, testssl.sh, lynis, nmap and more, each with its target, on both distributions; writes docs/benchmarks.md
	@scripts/packages demo
	@PYTHONPATH=scripts:molecule/shared/testing python -m judges

.PHONY: reliability
reliability: venv  ## Every fault on both distributions: what clients saw, what doctor said, how it healed; writes docs/reliability.md
	@scripts/packages demo
	@PYTHONPATH=scripts:molecule/shared/testing python scripts/reliability.py

.PHONY: docs
docs: venv  ## Write docs/variables.md from the roles' specifications
	python scripts/document

.PHONY: lock
lock: venv  ## Pin requirements.in by version and hash into requirements.txt; UPGRADE=1 for the newest versions
	@scripts/lock $(if $(UPGRADE),--upgrade)

.PHONY: clean
clean:  ## Remove the virtual environments and caches; `make demo-down` comes first
	@! test -e .cache/demo || { echo 'The demo is still there. Do: make demo-down, then make clean.' >&2; exit 1; }
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .ansible
