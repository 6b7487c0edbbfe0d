# make demo   sets everything up and runs the demo     make test   sets everything up and runs checks and tests
# make soak   an engine and a pool under faults for some minutes, in either mode;
#             SOAK="--requests 200 --seed 7 --mode direct" for another run
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SOAK ?=

# Setup is redone when the content of any of these changes, not when a checkout touches their dates.
SETUP_INPUTS := pyproject.toml constraints.txt $(wildcard polarkv_sglang/*/*.[ch])
STAMP := $(VENV)/.setup-$(shell cat $(SETUP_INPUTS) | sha256sum | cut -c1-16)

.PHONY: setup demo test test-full soak lint format clean

setup: $(STAMP)

$(STAMP):
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "== virtual environment in $(VENV): SGLang and its dependencies, about 11 GB and some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@rm -f $(VENV)/.setup-*
	@touch $@

demo: setup
	$(BIN)/python -m examples.smollm2
	$(BIN)/python -m examples.demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# UCX patches mmap and its like to hear of them, which nothing here needs and takes 0.4 s in each process; there are
# hundreds. Engines do as they would by themselves, and so do all in full runs.
test: lint
	UCX_MEM_EVENTS=n $(BIN)/python -m pytest -m "not slow and not gpu"

test-full: lint
	$(BIN)/python -m pytest

soak: setup
	$(BIN)/python -m tests.faults.soak $(SOAK)

clean:
	rm -rf $(VENV) models demo.json *_multiturn*.json *_multiturn.png coder_long_context*.json coder_long_context.png build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find polarkv_sglang kernels benchmarks examples tests -name __pycache__ -type d -prune -exec rm -rf {} +
	find polarkv_sglang -name '*.so' -delete
