# Two commands: `make book` and `make test`. Each sets up what it needs in .venv and reuses it the next time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SIZE   ?= book
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help book serve outputs export clean readme test test-long web bench wheel
help: ## What can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(READY): settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 10), "tokbook needs Python 3.10 or newer"'
	$(BIN)/pip install --quiet --editable '.[dev]'
	if git rev-parse --git-dir >/dev/null 2>&1; then $(BIN)/nbdev_install_hooks && cp .ci/pre-commit .ci/post-merge "$$(git rev-parse --git-path hooks)/"; fi
	touch $@

book: $(READY) ## Render the book into _docs/ (Quarto where it is installed, pandoc otherwise)
	$(BIN)/python -m tokbook.book build

serve: book ## Render the book and show it at http://localhost:8000
	$(BIN)/python -m tokbook.book serve

outputs: $(READY) ## Re-execute notebooks at size $(SIZE) and save their outputs: make outputs NB=pitome, or all
	$(BIN)/python -m tokbook.book outputs $(NB) --size $(SIZE)

export: $(READY) ## Generate tokbook/ from nbs/, clean the notebooks, remake README.md
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python -m tokbook.book readme

test: $(READY) web ## Everything that must hold, notebooks included (about 20 minutes on two cores)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q

test-long: $(READY) web ## The same with hundreds of random cases a kernel
	TOKBOOK_LONG=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q

web: $(READY) # what the browser tests need, where a browser, node and npm are there; the tests say so where not
	@if command -v npm >/dev/null && command -v chromium >/dev/null && [ ! -d tests/web/node_modules ]; then \
		cd tests/web && npm install --silent --no-package-lock --no-audit --no-fund || echo 'npm install failed: browser tests will be skipped'; fi

bench: $(READY) ## Measure every hot path on this machine: make bench DEVICE=cuda
	$(BIN)/python -m tokbook.bench --device $(or $(DEVICE),cpu)

wheel: $(READY) ## Build the wheel into dist/
	$(BIN)/python -m build --wheel
