# make train      from nothing to a trained model and its text
# make test-fast  the edit loop: most tests, in one to two minutes on two cores
# make test       every test that needs no GPU
# make test-gpu   those that need one
# make torture    the tests of survival with full counts
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU_TESTS = $(shell grep -rl "mark.cuda" --include="test_*.py" tests)

train: $(VENV)/installed
	$(BIN)/python prepare.py
	$(BIN)/python train.py --config tiny.json
	$(BIN)/python sample.py --model bin/tiny.strawberry --prompt "    def close(self):" --length 160 --temperature 0.7 --seed 1

# one thread for each of two workers: more of either only get in each other's way on two cores
test: $(VENV)/installed $(VENV)/logging
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-fast: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

# what needs a GPU, with the Python at hand (no GPU: nothing runs); those that fill or time the GPU come one by one
test-gpu:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q --cuda -n 8 -m "not whole_gpu" $(GPU_TESTS)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q --cuda -m whole_gpu $(GPU_TESTS)

# the tests of survival with full counts: a quarter of an hour; prints the table of docs/measurements.md
torture: $(VENV)/installed
	PYTHONPATH=.:tests/helpers OMP_NUM_THREADS=1 TORTURE=1 $(BIN)/python tests/training/torture.py

lint: $(VENV)/installed
	$(BIN)/ruff check .

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

# the packages of log_to, for their tests: pip skips lines with a marker of an extra
$(VENV)/logging: $(VENV)/installed
	sed -n 's/; extra == "logging"$$//p' requirements.txt | $(BIN)/python -m pip install -q -r /dev/stdin
	touch $@

clean:
	rm -rf $(VENV) data/*.bin bin/* img/*.png

.PHONY: train test-fast test test-gpu torture lint clean
