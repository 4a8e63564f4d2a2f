# make lab | reproduce | test | mutate | gpu | lint | docs | clean       (make help says more)
PYTHON   ?= python3
PROFILE  ?= quick
JOBS     ?= $(if $(filter quick,$(PROFILE)),2,1)
FORCE    ?= $(if $(filter quick,$(PROFILE)),--force)
OPEN     ?= 08_explore_patterns
BIN      := .venv/bin
STAMP    := .venv/installed

# Threads that wait without spinning: on a shared machine spinning ones slow each other down a hundredfold.
export OMP_WAIT_POLICY ?= passive
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install lab reproduce test mutate gpu lint docs clean
.DEFAULT_GOAL := help

help:
	@echo "make lab         JupyterLab on the notebooks, with the pattern explorer open   OPEN=09_explore_pruning"
	@echo "make reproduce   every notebook of a profile, into figures/     PROFILE=quick|smollm2|paper|FILE  NOTEBOOKS='01 02'"
	@echo "                 quick: all, two side by side, which weighs on what they time; one with JOBS=1"
	@echo "                 another profile: into figures/PROFILE, one by one, what is up to date is left; a stopped one goes on"
	@echo "make test        the whole test suite, notebooks included       ARGS='-k layout'"
	@echo "make mutate      faults put into FILES='s3lab/…', one by one: do tests notice?  ARGS='--sample 60'"
	@echo "make gpu         tests, solvers at the paper's size and kernels on a GPU, by $(PYTHON) as it is; a stopped one goes on"
	@echo "make docs        the documentation, into site/, from pages, docstrings and notebooks"
	@echo "make lint        ruff, pyright, and notebooks without outputs"
	@echo "make clean       remove .venv, caches and executed notebooks; figures stay"
	@echo "The first call makes .venv and installs the project there (PYTHON=$(PYTHON), 3.11 or newer)."

# The stamp is older than what it depends on, or missing, exactly when there is something to install.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "s3lab needs Python 3.11 or newer, not " \
		+ sys.version.split()[0] + ": make PYTHON=/path/to/python3")'
	@echo "installing into .venv, about 3 GB: takes some minutes, .venv/install.log tells"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --constraint constraints.txt --editable ".[all]" > .venv/install.log 2>&1 \
		|| { tail -n 20 .venv/install.log; exit 1; }
	@$(BIN)/python -c 'import platform, torch; \
		print("Python " + platform.python_version() + ", torch " + torch.__version__)' > $@.part
	@mv $@.part $@

install:
	@if $(MAKE) --no-print-directory --question $(STAMP) 2>/dev/null; \
	then echo "reusing .venv ($$(cat $(STAMP)), installed $$(date -r $(STAMP) '+%F %H:%M')): nothing to install"; \
	else $(MAKE) --no-print-directory $(STAMP); fi

lab: install
	@cd notebooks && ../$(BIN)/jupyter lab $(OPEN).ipynb

reproduce: install
	@$(BIN)/s3lab reproduce $(NOTEBOOKS) --profile $(PROFILE) --jobs $(JOBS) $(FORCE)

test: install
	@$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --nbval-lax $(ARGS)

mutate: install
	@PYTHONPATH=. $(BIN)/python benchmarks/mutate.py $(FILES) $(ARGS)

# Installs nothing: a machine with a GPU may have torch and triton, and no network.
gpu:
	@PYTHONPATH=. $(PYTHON) benchmarks/measure_gpu.py $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/nbstripout --verify notebooks/*.ipynb

# Warnings are errors (mkdocs.yml); the notice of what follows the theme is none of them.
docs: install
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build > .venv/docs.log 2>&1 || { grep -v '^INFO' .venv/docs.log; exit 1; }
	@echo "the documentation is site/index.html"

clean:
	rm -rf .venv build site *.egg-info .pytest_cache .ruff_cache .hypothesis figures/runs
	find s3lab tests -name __pycache__ -type d -exec rm -rf {} +
