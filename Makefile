# `make run`, `make test` and `make bench`, each from nothing on a fresh machine, in .venv.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: run test bench docs gallery package matrix install clean

run: install
	$(PY) -m reference_trainer

test: install
	$(PY) -m pytest -n 2

# Ratios of speed, one after the other, some ten minutes; for a machine that does nothing else.
bench: install
	for name in step_floor step_time coupling_time losses default_run; do $(PY) benchmarks/$$name.py || exit; done

# The documentation as a site, in build/site: open build/site/index.html.
docs: install
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "look at build/site/index.html"

# Every figure of README and docs again, in runs/gallery.
gallery: install
	$(PY) benchmarks/gallery.py

# sdist and wheel in dist/, and the tests that look into both and train with the wheel alone.
package: install
	rm -rf dist
	$(PY) -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > /dev/null
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz
	$(PY) -m pytest tests/test_package.py
	ls -l dist

# Every Python at hand with the oldest and the newest torch: noxfile.py. Fetches a torch for each.
matrix: install
	$(PY) -m pip install --quiet --disable-pip-version-check nox
	$(PY) -m nox --no-error-on-missing-interpreters

install: .venv/.installed

# constraints.txt pins torch: unpinned, pip would fetch gigabytes of CUDA on a machine without a GPU.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv .nox runs build dist
