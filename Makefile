# `make demo` and `make test` set up everything they need in .venv, with the versions that
# constraints.txt pins. PYTHON chooses the interpreter (3.11 or later).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint types imports unit audit test-ceph test-soak soak clean

demo: $(VENV)/demo.stamp
	$(BIN)/drl demo --out demo-out

test: lint types imports unit audit

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test.stamp
	$(BIN)/mypy

imports: $(VENV)/test.stamp
	$(BIN)/lint-imports

unit: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m "not ceph and not soak"

# Known vulnerabilities of what constraints.txt pins: fails on those that an update would end, passes
# (and says so) where there is no network.
audit: $(VENV)/test.stamp
	$(BIN)/python benchmarks/audit.py

# The same S3 tests against Ceph's gateway; needs Debian's ceph-mon ceph-osd ceph-common radosgw.
test-ceph: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m ceph

# Signals and kills on Ray, which take a minute each.
test-soak: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m soak

# Faults on purpose, for about half an hour; writes the table of docs/reliability.md.
soak: $(VENV)/test.stamp
	$(BIN)/python -m benchmarks.soak --write docs/reliability.md

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
