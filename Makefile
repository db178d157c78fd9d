# Everything a fresh machine needs: `make bench` or `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= reports
MATRIX ?= matrices/teacher_speed.yaml
ENGINE ?= docker
GPUS ?= $(if $(filter podman,$(ENGINE)),--device nvidia.com/gpu=all,--gpus all)

.PHONY: help install bench smoke test test-containers test-slow test-oldest perf perf-accept goals peers lint image-cu118 image-cu121 shell-cu118 shell-cu121 all data student teacher distill evaluate clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: $(VENV)/.installed  ## install into .venv with the tested versions

# torch comes first and exactly pinned: a range would pull another build with gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,cluster]'
	@touch $@

bench: install  ## the main job: measure the teacher's settings on the embedded catalogue, write a report
	$(BIN)/python -m bench.run $(MATRIX) --out $(OUT)

smoke: install  ## a minute: the same on two settings
	$(BIN)/python -m bench.run matrices/smoke.yaml --out $(OUT)

test: install lint  ## tests and house rules, under ten minutes on two cores
	$(BIN)/python -m pytest

test-slow: install  ## the heavy end-to-end tests that CI adds
	$(BIN)/python -m pytest -m slow

# torch and all else stay; only this one library comes before the installed one on the path.
OLDEST = $(shell grep -o 'transformers==[0-9.]*[0-9]' Dockerfile.cu121)
test-oldest: install  ## what is near transformers, with the oldest version the images carry
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/oldest $(OLDEST)
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest tests/test_transformers_range.py tests/test_llm.py \
		tests/test_ilora.py tests/test_last_layer.py tests/test_teacher.py tests/test_checkpoints.py tests/test_compiling.py tests/test_loop.py

test-containers: install  ## workers in real containers; needs docker or podman (tests/engine.sh start)
	$(BIN)/python -m pytest -m container -rs

perf: install  ## speed of our own code against what was accepted; writes reports/perf.md
	$(BIN)/python -m pytest tests/perf -m perf

perf-accept: install  ## make the present speed the accepted one; shows the difference to commit
	$(BIN)/python -m pytest tests/perf -m perf --perf-accept

goals: install  ## our own code against the old way and HF Trainer, side by side; writes reports/goals.md
	PYTHONPATH=tests $(BIN)/python -m perf.goals

PEERS ?= speed
peers: install  ## the student beside RecTools, RePlay and others, CPU time; writes reports/student_peers.md
	cd tests && PYTHONPATH=.. ../$(BIN)/python -m perf.peers $(PEERS)

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

image-cu118:  ## the container image of machine.image=cu118 (ENGINE=podman builds it for podman)
	$(ENGINE) build --file Dockerfile.cu118 --tag ilora-bench:cu118 .

image-cu121:  ## the same for cu121
	$(ENGINE) build --file Dockerfile.cu121 --tag ilora-bench:cu121 .

shell-cu118 shell-cu121: shell-%:  ## a shell in that image with this folder and all GPUs, which it lists
	$(ENGINE) run --rm -it $(GPUS) --network host --volume "$(CURDIR):$(CURDIR)" --workdir "$(CURDIR)" \
		ilora-bench:$* bash -c 'nvidia-smi --list-gpus; exec bash'

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache
