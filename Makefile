# `make run`, `make test` and `make bench`, each from nothing on a fresh machine, in .venv.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: run test bench install clean

run: install
	$(PY) -m reference_trainer

test: install
	$(PY) -m pytest -n 2

# Ratios of speed, one after the other, some ten minutes; for a machine that does nothing else.
bench: install
	for name in step_floor step_time coupling_time losses default_run; do $(PY) benchmarks/$$name.py || exit; done

install: .venv/.installed

# constraints.txt pins torch: unpinned, pip would fetch gigabytes of CUDA on a machine without a GPU.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs
