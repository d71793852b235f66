# make demo: the digits experiment · make test: the tests · make slow: those on gigabytes · make check: lint and types
# make tables: the README's table
# make fuzz: damaged files on every reader, for SECONDS=600
# make bench: what adapters cost, against the floor and other libraries (ONLY="switch llama" for some, DEVICE=cuda)
PYTHON ?= python3
SECONDS ?= 600
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test slow fuzz check tables bench clean

demo: .venv/digits.stamp
	$(BIN)/lorakit digits --out runs/digits

test: .venv/dev.stamp
	$(BIN)/python -m pytest -q -n 2

slow: .venv/dev.stamp
	$(BIN)/python -m pytest -q -s -m slow

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tables: .venv/dev.stamp
	PYTHONPATH=tests $(BIN)/python -m pairs

bench: .venv/dev.stamp
	$(BIN)/python -m benchmarks.speed $(if $(ONLY),--only $(ONLY)) $(if $(DEVICE),--device $(DEVICE))

fuzz: .venv/fuzz.stamp
	$(BIN)/python -m fuzz -max_total_time=$(SECONDS)

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/digits.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[digits]'
	touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[dev]'
	touch $@

.venv/fuzz.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[formats,fuzz]'
	touch $@
