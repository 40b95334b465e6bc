# make demo   set up, convert generated images, train, evaluate, show: minutes on two CPU cores
# make test   set up and run the tests (without those marked slow)
# make lint   set up, check style and types

PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: setup
	mkdir -p $(DEMO)
	$(BIN)/fastssl-convert shapes:4000 $(DEMO)/train.beton --overwrite
	$(BIN)/fastssl-convert shapes-val $(DEMO)/val.beton --overwrite
	$(BIN)/fastssl-train demo --data $(DEMO)/train.beton --val $(DEMO)/val.beton --out $(DEMO)/run --overwrite
	$(BIN)/fastssl-eval knn $(DEMO)/run --data $(DEMO)/train.beton --val $(DEMO)/val.beton
	@echo "Look at $(DEMO)/run/views.png (what the network saw) and $(DEMO)/run/curves.png (how it went)."

# Two processes, a thread each: threads of both would only wait for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(DEMO) .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
