# make demo [MODEL=DIR|smollm2]       quantize a model, serve it, compare it with bf16 and MXFP4
# make video [ARGS="..."]             the same videos in 16 bit, MXFP4 and SemanticDialect
# make serve MODEL=DIR [ARGS="..."]   serve a model with BlockDialect and leave the server running
# make test                           all tests, in four stages of two processes
# make lint                           formatting, lint, types, import directions
# make kernel                         compile the CPU kernel, which is else done on first use
# make clean                          remove what the others made
PYTHON ?= python3
MODEL ?= demo/model
ARGS ?=
RUN := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo video serve test lint types style kernel clean

help:
	@sed -n 's/^# //p' Makefile

setup:
	@$(PYTHON) scripts/setup_env.py

demo: setup
	@$(RUN) -m demo.language.run --model "$(MODEL)" $(ARGS)

## Threads that spin while they wait lose minutes beside another busy program.
video: export OMP_WAIT_POLICY ?= PASSIVE
video: setup
	@$(RUN) -m demo.video.run $(ARGS)

serve: setup
	@$(RUN) -m demo.language.serve --model "$(MODEL)" -- $(ARGS)

test: setup
	@$(RUN) scripts/run_tests.py

lint: style types

style: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@.venv/bin/lint-imports

types: setup
	@$(RUN) -m mypy

kernel: setup
	@$(RUN) -c "from dialect_kernels import cpu; cpu.available()"

clean:
	rm -rf .venv .cache outputs build dist *.egg-info scripts/vllm_metadata/build \
		scripts/vllm_metadata/*.egg-info .hypothesis .import_linter_cache .mypy_cache \
		.pytest_cache .ruff_cache
