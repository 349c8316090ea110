# SPDX-License-Identifier: Apache-2.0
# Each target sets up what it needs: a fresh clone needs Python >= 3.11, g++ and make, nothing else.
PYTHON ?=
VENV ?= .venv
MODEL_DIR ?= .models/smollm2
PORT ?= 30000
# Further options: of the demo, of the server, of pytest.
ARGS ?=

export PYTHON
BIN := $(VENV)/bin

.PHONY: help venv model demo serve test soak gpu kernels flashinfer lint

help:
	@echo 'make demo    serve long prompts with and without compression and compare'
	@echo 'make serve   start a server with compression and leave it running (PORT=$(PORT))'
	@echo 'make test    run all tests'
	@echo 'make soak    an hour of mixed traffic: lost slots, dead servers, wrong answers'
	@echo 'make gpu     run the kernels on this machine'"'"'s GPU against their references'
	@echo 'make kernels compile every Triton kernel for four GPUs, print registers and spills'
	@echo 'make flashinfer  compile the FlashInfer modules that decode_kernel=flashinfer uses (nvcc)'
	@echo 'make lint    ruff and mypy'
	@echo 'make model   write the demo model to MODEL_DIR=$(MODEL_DIR)'
	@echo 'make venv    make the virtual environment VENV=$(VENV), with SGLang (about 11 GB)'
	@echo
	@echo 'Each does what it needs of the set-up first. PYTHON chooses the interpreter, ARGS adds'
	@echo "options: make demo ARGS='--requests 6', make test ARGS='tests/unit'"

venv:
	docker/install.sh $(VENV) sglang,test,dev

model: venv
	$(BIN)/python -m benchmarks.demo_model $(MODEL_DIR)

demo: model
	$(BIN)/lava-sglang demo --model-path $(MODEL_DIR) $(ARGS)

serve: model
	$(BIN)/lava-sglang serve --model-path $(MODEL_DIR) --port $(PORT) -- \
	    --kv-compression lava_span --enable-metrics $(ARGS)

test: venv
	LAVA_MODEL_DIR=$(abspath $(MODEL_DIR)) $(BIN)/python -m pytest $(ARGS)

gpu: venv
	LAVA_TEST_DEVICE=cuda LAVA_MODEL_DIR=$(abspath $(MODEL_DIR)) $(BIN)/python -m pytest $(or $(ARGS),tests/kernels/launched tests/gpu)

soak: model
	$(BIN)/python -m tests.e2e.soak --model-path $(MODEL_DIR) $(ARGS)

kernels: venv
	$(BIN)/python -m tests.kernels.aot $(ARGS)

flashinfer: venv
	$(BIN)/python -m tests.kernels.flashinfer_module $(ARGS)

lint: venv
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
