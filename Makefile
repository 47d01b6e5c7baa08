# `make demo` and `make test` each make .venv, install Tokensieve into it, and run. A second call starts at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without a GPU, the tested releases are installed: the newest torch would bring gigabytes of CUDA libraries.
CONSTRAINTS ?= $(if $(shell command -v nvidia-smi),,-c constraints-cpu.txt)

.PHONY: demo test clean

demo: $(VENV)/.installed-all
	$(BIN)/tokensieve compare --limit 400 --output runs/demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

# one stamp per extra: the install is repeated only when one of these files has changed
$(VENV)/.installed-%: pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist
