# Two commands on a fresh machine that has Python (3.11 or newer), make and a compiler:
#   make demo   trains a small isiZulu model on samples/, scores it and lets it write
#   make test   passes the tests
# and one that trains the shipped model again from its corpora (scripts/isizulu-card.md names them), in minutes on a GPU,
# in more than a day without:
#   make isizulu-model CORPORA=/path/to/corpora
# Each makes its own environment in .venv first; the second time there is nothing to do.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The version that the figures in docs/ were measured with. PyPI's wheel for Linux brings CUDA (several GB); README.md
# says how to get the CPU build.
TORCH ?= torch==2.13.0
DEMO ?= runs/demo
ISIZULU ?= runs/isizulu-model

.PHONY: demo demo-model isizulu-model bench test check format lint types clean
.DELETE_ON_ERROR:

$(BIN)/ulimi: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, '$(PYTHON)' is older: make PYTHON=python3.12 …"; exit 2; }
	@echo "making the environment $(VENV): a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar on "$(TORCH)" --editable ".[all]"
	@touch $@

$(VENV)/dev: $(BIN)/ulimi
	$(BIN)/python -m pip install --progress-bar on "$(TORCH)" --editable ".[dev]"
	@touch $@

$(DEMO)/README.md: $(BIN)/ulimi samples/isizulu.txt src/ulimi/recipes/demo.toml
	rm -rf $(DEMO)
	$(BIN)/ulimi train samples/isizulu.txt --recipe demo --out $(DEMO)

# First the model that ships, then the small one that is trained here.
demo: $(BIN)/ulimi
	$(BIN)/ulimi generate "Namhlanje" --seed 1 --max-tokens 60
	$(BIN)/ulimi suggest "Ngiyabonga kakh" --num 3
	echo "Abantwana bafunda isiZulu esikoleni." | $(BIN)/ulimi score
	$(MAKE) --no-print-directory demo-model

demo-model: $(DEMO)/README.md
	$(BIN)/ulimi evaluate $(DEMO)/corpus/valid.txt $(DEMO)/corpus/test.txt -m $(DEMO)
	$(BIN)/ulimi generate "Namhlanje" -m $(DEMO) --seed 1 --max-tokens 60
	$(BIN)/ulimi generate "Umfundi" -m $(DEMO) --seed 2 --max-tokens 40 --probabilities

isizulu-model: $(BIN)/ulimi
	ULIMI=$(BIN)/ulimi scripts/isizulu-model.sh "$(CORPORA)" "$(ISIZULU)"

# A quarter of an hour on one quiet core; the peers are installed first. docs/performance.md says what the figures are.
bench: $(BIN)/ulimi
	$(BIN)/python -m pip install --progress-bar on "$(TORCH)" --editable ".[bench]"
	for name in generation scoring install; do \
	  $(BIN)/python benchmarks/$$name.py --out benchmarks/results/$$name.json || exit 1; done
	$(BIN)/python benchmarks/report.py

test: $(VENV)/dev
	$(BIN)/python -m pytest

format: $(VENV)/dev
	$(BIN)/ruff format

lint: $(VENV)/dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: $(VENV)/dev
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) $(DEMO) .mypy_cache .ruff_cache .pytest_cache
