# Everything a fresh machine needs: `make bench` or `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= reports
MATRIX ?= matrices/teacher_speed.yaml

.PHONY: help install bench smoke test lint all data student teacher distill evaluate clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(VENV)/.installed  ## install into .venv with the tested versions

# torch comes first and exactly pinned: a range would pull another build with gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

bench: install  ## the main job: measure the teacher's settings on the embedded catalogue, write a report
	$(BIN)/python -m bench.run $(MATRIX) --out $(OUT)

smoke: install  ## a minute: the same on two settings
	$(BIN)/python -m bench.run matrices/smoke.yaml --out $(OUT)

test: install lint  ## tests and house rules, under ten minutes on two cores
	$(BIN)/python -m pytest

test-slow: install  ## the heavy end-to-end tests that CI adds
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

all: install  ## the whole pipeline: student, teacher, outputs, distilled student, comparison
	$(BIN)/python -m core.run $(SETTINGS)

data: install  ## prepare the ratings
	$(BIN)/python -m core.run $(SETTINGS) prepare_data

student: install  ## baseline student, from the ratings on
	$(BIN)/python -m core.run $(SETTINGS) prepare_data student_fit student_test

teacher: install  ## teacher and its outputs, from the ratings on
	$(BIN)/python -m core.run $(SETTINGS) prepare_data student_fit teacher_fit teacher_test teacher_outputs

distill: install  ## distilled student; wants the teacher's outputs
	$(BIN)/python -m core.run $(SETTINGS) distill_fit distill_test

evaluate: install  ## the three models side by side
	$(BIN)/python -m core.run $(SETTINGS) evaluate_all

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache
