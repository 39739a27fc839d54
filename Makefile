# make setup  builds .venv alone
# make demo   builds .venv, then runs the whole pipeline on real input on the CPU
# make test   builds .venv, then lint, type check, every test that is not marked slow
# make reference  builds .venv, then trains and quantizes the reference model, one to two hours on two cores
# make native builds .venv, then trains GPT-2 (124M) for 80 steps, quantizes it and measures the native engine on it
# make wheel  builds dist/*.whl with the native engine inside: it installs without a compiler
# make lint   lint and type check alone

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := runs/demo
NATIVE := $(foreach end,cpp h inl,$(wildcard export/native/*.$(end) export/native/*/*.$(end)))

.PHONY: setup demo reference native wheel test lint clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# pip, not uv: pip finds a CPU build of torch where the machine provides one.
$(STAMP): pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,export,gguf,onnx,serve,bench,dev]'
	touch $@

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash bench/demo.sh $(DEMO)

reference: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash bench/reference.sh runs/reference

native: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash bench/native.sh runs/gpt2-short

wheel:
	rm -rf build/lib* build/bdist* build/temp*
	$(PYTHON) -m venv build/venv
	build/venv/bin/pip wheel --quiet --disable-pip-version-check --no-deps -w dist .
	@$(PYTHON) -m zipfile -l $$(ls -t dist/*.whl | head -1) | grep -q libengine.so || \
	  { echo "dist/*.whl holds no engine: no C++17 compiler built it" >&2; exit 1; }
	@ls dist/*.whl

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder --durations=10

clean:
	rm -rf runs build dist *.egg-info export/jaxgpt_export/native/*.so .pytest_cache .mypy_cache .ruff_cache
