# `make` alone lists what there is.
.DEFAULT_GOAL := help
SHELL := /bin/bash
DISTRO ?= trixie
export DISTRO
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help
help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo:  ## Boot a throwaway host, provision it, post an event over TLS; DISTRO=bookworm or trixie
	@python3 scripts/demo up --distribution $(DISTRO)

.PHONY: demo-host
demo-host:  ## The demo up to the point where `ansible-playbook -i inventory/demo site.yml` can run
	@python3 scripts/demo host --distribution $(DISTRO)

.PHONY: demo-down
demo-down:  ## Remove all of the demo
	@python3 scripts/demo down

.PHONY: venv
venv:  ## Make .venv from requirements.txt
	@scripts/venv

.PHONY: lock
lock:  ## Pin requirements.in by version and hash into requirements.txt; UPGRADE=1 for the newest versions
	@scripts/venv
	@scripts/lock $(if $(UPGRADE),--upgrade)
