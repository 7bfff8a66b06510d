# One command each: everything needed is installed into $(VENV).
VENV ?= .venv
PYTHON ?= python3

.PHONY: demo test lint sanitize sanitize-threads clean

# Upsample the photograph that ships with the project; random weights if the published ones cannot be fetched.
demo: $(VENV)/demo.installed
	$(VENV)/bin/vitup-fast upsample examples/chelsea.png -o out --size 150 226 --hidden-layer-img-size 320 480 --pca --or-random

test: $(VENV)/test.installed
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 8

lint: $(VENV)/dev.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Memory errors and undefined behaviour of the compiled code; and races between its threads.
sanitize: $(VENV)/test.installed
	PYTHON=$(VENV)/bin/python .ci/sanitize address,undefined test_cpu_kernels.py test_cuda_kernels.py \
	  test_fingerprint.py test_operations.py -k "not triton" --numprocesses auto --maxprocesses 8

sanitize-threads: $(VENV)/test.installed
	PYTHON=$(VENV)/bin/python .ci/sanitize thread test_cpu_kernels.py test_fingerprint.py -k thread

$(VENV)/%.installed: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info vitup_fast/_C* vitup_fast/build.json
