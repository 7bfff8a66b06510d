# One command each: everything needed is installed into $(VENV).
VENV ?= .venv
PYTHON ?= python3

.PHONY: demo test lint clean

# Upsample the photograph that ships with the project; random weights if the published ones cannot be fetched.
demo: $(VENV)/demo.installed
	$(VENV)/bin/vitup-fast upsample examples/chelsea.png -o out --size 150 226 --hidden-layer-img-size 320 480 --pca --or-random

test: $(VENV)/test.installed
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 8

lint: $(VENV)/dev.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/%.installed: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info vitup_fast/_C* vitup_fast/build.json
