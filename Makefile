# make demo    environment, install, and the main job on the embedded data: a report in minutes
# make test    environment, install, all tests
# make bench   the benchmark tables of docs/benchmarks.md, against Pythae and torch in an environment of their own;
#              ROUNDS=N repeats what is compared with a peer, in turns, for medians
#
# PYTHON picks the interpreter (3.11 or newer); each has an environment of its own.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= .venv-$(VERSION)
RUN := $(VENV)/bin/python
PEERS ?= .venv-peers-$(VERSION)
ROUNDS ?= 1
CONFIG ?= experiments/nvae_nce.py
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/xla-$(VERSION)
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES = -1

# A file to a process, which clears JAX's caches after it; in the order of their names, as the file of fewest tests is no quick one.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast bench install clean

demo: install
	$(RUN) -m latentgen.main --config=$(CONFIG)

test: install
	JAX_PLATFORMS=cpu $(RUN) $(PYTEST)

test-fast: install
	JAX_PLATFORMS=cpu $(RUN) $(PYTEST) -m "not slow"

bench: install $(PEERS)/.installed
	$(RUN) bench/run.py --peers="$$(cat $(PEERS)/.installed 2>/dev/null || tail -n 1 $(PEERS)/failure)" --rounds=$(ROUNDS) --out=docs/benchmarks.md

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("latentgen needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# What it holds is the interpreter. Without it the benchmarks say what failed and go on; the next run tries again.
$(PEERS)/.installed: bench/requirements.txt
	$(PYTHON) -m venv $(PEERS)
	-$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r bench/requirements.txt 2> $(PEERS)/failure \
	  && echo $(PEERS)/bin/python > $@

clean:
	rm -rf .venv-* .cache .pytest_cache
