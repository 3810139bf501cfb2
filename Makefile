# Targets for people and CI; `make` lists them. Needs Python 3.11+ and any make (GNU 3.81 or newer).

PYTHON ?= python3
VENV ?= .venv
# What pip holds versions to; /dev/null for the newest of everything.
CONSTRAINTS ?= constraints.txt
# Folders of finished runs, for `make report` and `make results`.
RUNS ?=
# Passed through to what a target runs:  make train ARGS="dataset=hm backbone=transformer"
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help train report results test test-slow lint format docs bench dist clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-10s %s\n", $$1, $$2 }'

train: $(STAMP) ## train a model; ARGS="dataset=hm backbone=transformer" and any other option
	@$(BIN)/python -m recsys_ssm.train $(if $(ARGS),$(ARGS),dataset=spotify backbone=mamba)

report: $(STAMP) ## tables and figures of finished runs; RUNS=runs/multirun/<name>
	@$(BIN)/python -m recsys_ssm.report $(if $(RUNS),$(RUNS),runs) $(ARGS)

results: $(STAMP) ## docs/results.md and the README's table from results/; RUNS=<folder> puts its runs there first
	@$(if $(RUNS),$(BIN)/python -m recsys_ssm.report $(RUNS) results=results $(ARGS))
	@$(BIN)/python scripts/results_page.py

test: $(STAMP) ## run the tests on all cores; ARGS="-k mamba" and any other pytest option
	@$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-slow: $(STAMP) ## run the tests that take minutes
	@$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(STAMP) ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## put the code into the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(STAMP) ## build the documentation site into build/site
	@$(BIN)/python scripts/options_page.py --check
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)

bench: $(STAMP) ## measure speed and memory beside other implementations
	@for script in ops train_step data_loading; do \
	  echo "== $$script"; OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/$$script.py $(ARGS) || exit 1; \
	done

dist: $(STAMP) ## build the wheel and the source package into dist/
	@$(BIN)/python -m build $(ARGS)

clean: ## remove what was built, the virtual environment included; runs and logs stay
	rm -rf $(VENV) build dist .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache
	find recsys_ssm tests -name __pycache__ -type d -prune -exec rm -rf {} +
	find recsys_ssm \( -name '*.so' -o -name '*.dylib' -o -name '*.dll' \) -type f -exec rm -f {} +

# Install once, and again when one of these files is newer.
$(STAMP): pyproject.toml scripts/venv.sh $(filter-out /dev/null,$(CONSTRAINTS)) \
    CMakeLists.txt $(wildcard recsys_ssm/ops/csrc/*)
	@sh scripts/venv.sh $(PYTHON) $(VENV) $(CONSTRAINTS)
