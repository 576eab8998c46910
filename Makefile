# make bench and make test need Python 3.10 or newer, make and a C++ compiler; the rest is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TRITON_TESTS := $(addprefix tests/backends/triton/,test_triton.py test_triton_dist.py test_triton_looped.py test_triton_uskd.py \
  test_triton_zipf.py)
CXX_FILES := $(shell find csrc tools -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: bench bench-guard test thorough packages sanitize compilers ptx train study kernels gpu-check gpu-profile \
  integrations docs lint format wheel release-check clean
bench: $(VENV)/ready
	$(BIN)/python -m benchmarks --quick

# On an idle machine: fails where fused_kd is more than 15 % slower, relative to the others, than the committed results of
# this kind of processor have it. Not in CI.
bench-guard: $(VENV)/ready
	$(BIN)/python -m benchmarks guard

# A process per core: most tests have one thread. Compiled GPU code has processes of its own, in which Triton compiles.
test: $(VENV)/tested
	$(PYTEST)
	$(PYTEST) -p tools.ptx.triton.plugin tests/compiled

# The cases that `make test` leaves out for their time: some ten minutes.
thorough: $(VENV)/tested
	$(PYTEST) -m slow --ignore tests/package/test_packages.py --deselect tests/tools/test_compile_matrix.py::test_every_kernel

# Builds the sdist and the wheel, and installs each in an environment of its own, which downloads CMake; minutes.
packages: $(VENV)/tested
	$(BIN)/python -m pytest -m slow tests/package/test_packages.py

# The C++ core built with GCC's sanitizers, compared with float64 and tested.
sanitize: $(VENV)/ready
	$(BIN)/python -m tools.compilers --sanitize

# The C++ core built by g++ and clang++, where they are, at -O1 to -O3 with contraction off and on: none may miss a case.
compilers: $(VENV)/ready
	$(BIN)/python -m tools.compilers

# All tests of the Triton and of the CUDA kernels on compiled code, executed by tools/ptx: an hour or so.
ptx: $(VENV)/tested
	$(PYTEST) -p tools.ptx.triton.plugin tests/compiled $(TRITON_TESTS)
	$(PYTEST) -p tools.ptx.cuda.plugin tests/backends/cuda

# A small CNN on a thousand Chinese characters drawn from the fonts that are installed; a second call shows the result.
train: $(VENV)/ready
	$(BIN)/python study/train.py --model cnn-small --loss ce --epochs 4 --batch-size 128 --out runs/ce --resume

# The paper's comparison at small scale, into docs/study.md: what has no record in study/records is trained, in some six hours
# of two cores if nothing has. PART names parts of it: rates, main, longer, own, ablations, cost, page.
study: $(VENV)/ready
	$(BIN)/python -m study $(if $(PART),--part $(PART)) --update README.md docs/which-loss.md

kernels: $(VENV)/ready
	$(BIN)/python -m tools.compile_matrix --full

# In the Python at hand, which has the PyTorch built for the GPU; no network is needed.
gpu-check:
	$(PYTHON) -m tools.gpu.check $(or $(OUT),benchmarks/results)

# What the kernels move, by the GPU's counters, which mostly takes root to read.
gpu-profile:
	$(PYTHON) -m tools.gpu.profile $(or $(OUT),benchmarks/results)

# The site, into site/. A link that leads nowhere is an error; --quiet would hide it. Open site/index.html, no server or
# network is needed.
docs: $(VENV)/documented
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/documented
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# Editable, so that what changes here is what is tested and timed.
$(VENV)/ready: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade 'pip>=25.1' # the first that knows --group
	$(INSTALL) torch
	PYTHONWARNINGS=ignore $(INSTALL) --editable '.[bench,test,triton,lint,examples]'
	touch $@

# What makes the site. Its hooks are type-checked with it, and tested.
$(VENV)/documented: $(VENV)/ready
	$(INSTALL) --group docs
	touch $@

# The sdist and the wheel in dist/, looked at by auditwheel and twine, and used where they are installed.
wheel: $(VENV)/release
	$(BIN)/python -m tools.release.wheel

# What must hold before a version is tagged.
release-check: $(VENV)/release
	$(BIN)/python -m tools.release.check

$(VENV)/release: $(VENV)/ready
	$(INSTALL) --group release
	touch $@

# The frameworks of docs/integrations.md, which the benchmark does without.
$(VENV)/tested: $(VENV)/documented
	$(INSTALL) --group integrations
	touch $@

# The pages of docs/ with the frameworks themselves, in an environment of its own of some 6 GB.
INTEGRATIONS := .venv-integrations
integrations:
	test -x $(INTEGRATIONS)/bin/python || $(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(INTEGRATIONS)/bin/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1 timm torchdistill --group integrations
	$(INTEGRATIONS)/bin/python -m pip install --quiet --editable '.[test]'
	$(INTEGRATIONS)/bin/python -c "import timm, torchdistill, torchvision, transformers, lightning, mmengine, cv2"
	$(INTEGRATIONS)/bin/python -m pytest tests/docs

clean:
	rm -rf $(VENV) $(INTEGRATIONS) build dist *.egg-info fused_kd/_native*.so fused_kd/_native_missing.txt
