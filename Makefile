# `make demo` and `make test` each make .venv, install Tokensieve into it, and run. A second call starts at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test clean

demo: $(VENV)/.installed-all
	$(BIN)/tokensieve compare --limit 400 --output runs/demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

# one stamp per extra: the install is repeated only when pyproject.toml has changed
$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist
