# LoRA Lab. Needs Python 3.11 or newer and make; the first run needs the network once.
# What the set-up does, and its error messages, are in tools/setup_env.py.

PORT ?=
# The Python that makes .venv: the one you name (make lab PYTHON=python3.12), or the first of these that runs.
PYTHONS = $(or $(PYTHON),python3.13 python3.12 python3.11 python3.14 python3.15 python3 python)
PY = .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)/python

.PHONY: help env env-test lab check test test-unit test-notebooks test-solved bench notebooks editions clean
.NOTPARALLEL:

help:
	@echo "make lab        set up what is missing, then open JupyterLab on notebook 00 (make lab PORT=8899)"
	@echo "make env        the set-up alone, in .venv"
	@echo "make check      what works on this machine, and what to do about the rest"
	@echo "make test       the whole suite: test-unit, test-notebooks, test-solved"
	@echo "make bench      speed and memory, as a table"
	@echo "make notebooks  run all notebooks again and store clean outputs"
	@echo "make editions   an instructor's copy and a handout, in editions/"
	@echo "make clean      remove caches and build leftovers (to remove the environment, delete .venv)"

# A name on the PATH may be an empty shim, or too old: take the first Python that runs and is new enough.
define setup
@for python in $(PYTHONS); do \
    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
    then exec $$python -I tools/setup_env.py $(1); fi; \
done; \
for python in $(PYTHONS); do found=$$($$python --version 2>&1) && break; found="no Python"; done; \
echo "LoRA Lab needs Python 3.11 or newer; found here: $$found. Install one (python.org or your system's packages)" \
     "and run the same command again, or name it: make lab PYTHON=/path/to/python3.12" >&2; exit 1
endef

env:
	$(call setup,env)

env-test:
	$(call setup,env test)

lab:
	$(call setup,lab $(PORT))

check: env
	@$(PY) tools/check_env.py details

# Two workers with one thread each are faster than two that fight for both cores: hence OMP_NUM_THREADS=1.
test: env-test
	@start=$$(date +%s); \
	if $(MAKE) --no-print-directory test-unit test-notebooks test-solved; \
	then echo "make test: all three steps passed, in $$(($$(date +%s) - start)) s"; \
	else echo "make test: stopped at the step above, which failed, after $$(($$(date +%s) - start)) s" >&2; exit 1; fi

test-unit: env-test
	@echo "== 1 of 3: unit tests"
	OMP_NUM_THREADS=1 $(PY) -m pytest tests --ignore=tests/notebooks -n 2 --dist loadfile

test-notebooks: env-test
	@echo "== 2 of 3: every cell of every notebook gives what is stored"
	OMP_NUM_THREADS=1 $(PY) -m pytest --nbval notebooks -n 2 --dist loadfile --nbval-current-env \
	    --nbval-cell-timeout=60 --nbval-sanitize-with=tests/nbval_sanitize.cfg -p no:cacheprovider \
	    -p tests.nbval_strict

test-solved: env-test
	@echo "== 3 of 3: the notebooks with their exercises solved, in a browser if there is one"
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/notebooks -n 2 --dist worksteal

bench: env-test
	$(PY) -m benchmarks

notebooks: env-test
	$(PY) -m tools.notebooks run

editions: env
	$(PY) -m tools.notebooks editions

clean:
	rm -rf .cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +
