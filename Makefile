# Everything runs in .venv. Each target installs what it needs there, once. These can be set as in
# `make serve PORT=8080`, but not in the environment, where conda, for one, has another HOST.
PYTHON = python3
HOST = 0.0.0.0
PORT = 3000
RECIPE = accurate
RUN = runs/$(notdir $(RECIPE:%.toml=%))-seed0
OUT = models/default.onnx
PRECISION = int8
TTA =
TRIAL =
GPU = 0
SECONDS = 120
FIGURES = runs/figures

# Otherwise BentoML reports each start to its makers.
export BENTOML_DO_NOT_TRACK := True

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test lint setup train export bench soak fuzz image

help:  ## show this help
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

serve: .venv/.serve  ## start the service with the bundled model (HOST=0.0.0.0 PORT=3000)
	.venv/bin/bentoml serve --host $(HOST) --port $(PORT)

# Files are not split and keep their order, so that a worker makes the fixtures of a package only once.
test: lint  ## run ruff, the type checker and all tests
	.venv/bin/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: .venv/.dev  ## run ruff and the type checker
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

setup: .venv/.export  ## install what training and export need, to use their commands in .venv/bin

train: .venv/.train  ## train a recipe (RECIPE=accurate), which adds its row to training/results.csv
	.venv/bin/python -m training run "$(RECIPE)"

export: .venv/.export  ## turn a run into a model file (RUN=runs/accurate-seed0 OUT=models/default.onnx PRECISION=int8 TTA= TRIAL=)
	.venv/bin/python -m export write "$(RUN)/checkpoint.pt" "$(OUT)" --precision $(PRECISION) \
		$(if $(TTA),--tta $(TTA)) $(if $(TRIAL),--calibration-from "$(TRIAL)/checkpoint.pt")

bench: .venv/.peers  ## measure the pace of training, inference and serving (FIGURES=runs/figures; those in the README: benchmarks)
	mkdir -p $(FIGURES)
	.venv/bin/python -m benchmarks.training --figures $(FIGURES)/training.json
	.venv/bin/python -m benchmarks.inference --figures $(FIGURES)/inference.json
	.venv/bin/python -m benchmarks.serving --figures $(FIGURES)/serving.json

soak: .venv/.bench  ## ten minutes of mixed load and bad input against a server (FIGURES=runs/figures)
	mkdir -p $(FIGURES)
	.venv/bin/python -m benchmarks.soak --figures $(FIGURES)/soak.json

fuzz: .venv/.dev  ## search for bytes that break the service's readers (SECONDS=120 for each of three)
	.venv/bin/python -m tests.serving.fuzz --seconds $(SECONDS)
	.venv/bin/pytest --hypothesis-profile=search $(addprefix tests/serving/test_, fuzz.py images.py pickles.py)

image:  ## build the Docker image (GPU=1 for CUDA)
	docker build --tag cifar10 --build-arg GPU=$(GPU) .

# One stamp for each extra of pyproject.toml; a change to either file installs the extra again.
.venv/.%: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
