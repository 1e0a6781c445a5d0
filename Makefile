# make demo: train a tokenizer and a generator on real pictures and see what they draw (CPU, minutes)
# make test: all tests
# Both set up .venv first (make install); a second call is quick.
#
# PYTHON=python3.12        another interpreter
# TORCH_INDEX=URL          where to take torch and torchvision from, such as https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test bench lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet torch torchvision --index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: install
	$(BIN)/python train/demo.py

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

bench: install
	$(BIN)/python -m tests.benchmarks

lint: install
	$(BIN)/ruff check .

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs demo-output build *.egg-info .pytest_cache .ruff_cache
