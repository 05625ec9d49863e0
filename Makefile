# The two commands of the README: `make demo` and `make test`. `make check` is the fast part of the tests.
#
#   PYTHON=/path/to/python3.12   which interpreter makes .venv (found by itself otherwise)
#   TORCH_INDEX=URL              an index that offers torch's CPU-only wheel (the default brings the CUDA build)
#   DEMO_DIR=runs/demo           where the demo campaign lives
#   WORKERS=2                    processes for the fast part of the tests

VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR ?= runs/demo
WORKERS ?= 2
SLOW := slow or gpu or browser
# One thread a process: two training processes on two cores, and the same bits on every machine.
export OMP_NUM_THREADS := 1
export TORCHDYNAMO_DISABLE := 1

.PHONY: demo control challenge test check lint install clean

demo: $(VENV)/installed
	$(BIN)/megatron-evolve run demo --dir $(DEMO_DIR)

control: $(VENV)/installed
	$(BIN)/megatron-evolve run control --dir runs/control

# The slow part one test at a time: its campaigns use two cores themselves. It runs whatever the fast part says.
test: $(VENV)/installed-test
	@$(MAKE) --no-print-directory check; fast=$$?; $(BIN)/python -m pytest tests -m "$(SLOW)" && exit $$fast

check: $(VENV)/installed-test
	$(BIN)/python -m pytest tests -m "not ($(SLOW))" -n $(WORKERS) --dist loadfile

lint: $(VENV)/installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

install: $(VENV)/installed

# Reinstalled when the dependencies change, never otherwise: a second `make demo` starts at once.
$(VENV)/installed: pyproject.toml setup.py
	@sh launch/install.sh "$(VENV)" "$(TORCH_INDEX)"
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
