# make demo           install, then sample from the included models into demo/: three clips, and one through the full cascade
# make app            install Gradio too, then serve the page with the included models and open it
# make check          lint, type check and the fast tests; run it before every commit
# make test           the test suite
# make heavy-test     tests that are too slow for `make test`: more meshes, stages, sizes and whole runs
# make beam-test      tests of the curation on Apache Beam, in an environment of their own (.venv-beam): Beam needs other
#                     versions of libraries
# make crash-test     kill a small training run at 50 random moments, also inside saves and on two hosts; the result must not change
# make wheel-test     build a wheel, install it into an empty environment, and sample there; WHEEL=--offline: with
#                     the packages of .venv
# make lint           ruff: rules and formatting
# make typecheck      ty: names, attributes, imports and the arguments of calls
# make parity-full    reproduce every golden case, including the full-size models (10 GB of memory, minutes)
# make train-demo     train on Moving Shapes on a CPU: VAE, image model, video model, then evaluate (2 cores: about 2 hours);
#                     after an interruption, the same command resumes
# make train-cascade  likewise interpolation and super-resolution, from the included base model (2 cores: 1 to 2 hours)
# make film           fetch a real film, cut it into clips, train super-resolution and interpolation on it, and measure them
#                     (2 cores: about 3 hours); after an interruption, the same command resumes
#
# The targets create .venv themselves. To choose the Python version: make PYTHON=/path/to/python3.12 demo

VENV := .venv
BEAM := .venv-beam
RUNS := runs/train-demo
CASCADE := runs/train-cascade
FILM := runs/film
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet --quiet
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

# Test files for `make check`, chosen by their measured CPU time (about 60 seconds together) and by how much they cover.
FAST := docs errors imports layers lock loss originals schedule sheets stages torch_for_tests typecheck \
	windows

.PHONY: demo app check test heavy-test beam-test crash-test wheel-test lint typecheck parity-full train-demo train-cascade film

demo: $(VENV)/requirements.stamp
	$(PY) sample.py --out demo --overwrite \
		--prompt "a red circle moving left" \
		--prompt "a small yellow star moving down over a blue background" \
		--prompt "a large green triangle standing still over a black background"
	$(PY) sample.py --out demo/cascade --overwrite --stages base,interpolation,vsr --vsr-window-frames 61 \
		--prompt "a red circle moving left"
	@echo "Videos, contact sheets and JSON files with all settings are in $(CURDIR)/demo and demo/cascade"

app: $(VENV)/app.stamp
	$(PY) -m lavie_jax.app --open

check: lint typecheck
	$(PY) -m pytest --quiet --durations=0 --durations-min=2 --numprocesses=2 --dist=loadfile $(FAST:%=tests/test_%.py) \
		tests/test_samplers.py::test_the_original_loops_are_reproduced

test: $(VENV)/test.stamp
	@$(PY) tools/torch_for_tests.py
	@$(PY) tools/libtpu_for_tests.py
	@$(PY) tools/metric_weights.py
	$(PY) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

heavy-test: $(VENV)/test.stamp
	$(PY) -m pytest -m heavy --numprocesses=auto --maxprocesses=4 --dist=load

beam-test: $(BEAM)/test.stamp
	$(BEAM)/bin/python -m pytest tests/test_curation_beam.py

crash-test: $(VENV)/requirements.stamp
	JAX_PLATFORMS=cpu $(PY) tools/crash_test.py

wheel-test: $(VENV)/test.stamp
	$(PY) tools/wheel_test.py $(WHEEL)

lint: $(VENV)/test.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

typecheck: $(VENV)/test.stamp
	$(PY) -m ty check

parity-full: $(VENV)/requirements.stamp
	JAX_PLATFORMS=cpu $(PY) -m lavie_jax.parity tests/golden

train-demo: $(VENV)/requirements.stamp
	$(PY) train.py --config configs/moving_shapes/vae.py --workdir $(RUNS)/vae
	$(PY) train.py --config configs/moving_shapes/image.py:cpu --workdir $(RUNS)/image \
		--config.vae_from=$(RUNS)/vae/weights
	$(PY) train.py --config configs/moving_shapes/motion.py:cpu --workdir $(RUNS)/motion \
		--config.init_from=$(RUNS)/image/weights
	$(PY) train.py --config configs/moving_shapes/base.py:cpu --workdir $(RUNS)/base \
		--config.init_from=$(RUNS)/motion/weights
	$(PY) -m lavie_jax.evaluation.moving_shapes --weights $(RUNS)/base/weights --json $(RUNS)/evaluation.json
	@echo "The model is in $(CURDIR)/$(RUNS)/base/weights: $(PY) sample.py --weights $(RUNS)/base/weights --prompt ..."

train-cascade: $(VENV)/requirements.stamp
	$(PY) train.py --config configs/moving_shapes/interpolation.py:cpu --workdir $(CASCADE)/interpolation-short
	$(PY) train.py --config configs/moving_shapes/interpolation.py:cpu --workdir $(CASCADE)/interpolation \
		--config.init_from=$(CASCADE)/interpolation-short/weights --config.inflate=false --config.data.frames=33 \
		--config.batch=2 --config.steps=800 --config.optimizer.learning_rate=5e-4
	$(PY) train.py --config configs/moving_shapes/vsr_vae.py --workdir $(CASCADE)/vsr_vae \
		--config.init_from=lavie_jax/assets/base
	$(PY) train.py --config configs/moving_shapes/upscaler.py:cpu --workdir $(CASCADE)/upscaler \
		--config.vae_from=$(CASCADE)/vsr_vae/weights
	$(PY) train.py --config configs/moving_shapes/vsr.py:cpu --workdir $(CASCADE)/vsr \
		--config.init_from=$(CASCADE)/upscaler/weights
	$(PY) -m lavie_jax.evaluation.cascade --interpolation-weights $(CASCADE)/interpolation/weights \
		--vsr-weights $(CASCADE)/vsr/weights --json $(CASCADE)/evaluation.json

film: $(VENV)/test.stamp
	@$(PY) tools/metric_weights.py
	$(PY) tools/real_film.py --out data/film
	$(PY) train.py --config configs/film/vsr.py --workdir $(FILM)/vsr
	$(PY) train.py --config configs/film/interpolation.py --workdir $(FILM)/interpolation
	$(PY) -m tools.ship_weights $(FILM)/vsr/weights $(FILM)/weights/vsr
	$(PY) -m tools.ship_weights $(FILM)/interpolation/weights $(FILM)/weights/interpolation
	$(PY) benchmarks/film.py --data data/film --weights $(FILM)/weights --out $(FILM)/measures

$(VENV)/pip.stamp:
	@test -n "$(PYTHON)" || \
		{ echo "error: no Python 3.11 or newer found; choose one with make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/requirements.stamp: requirements.txt $(VENV)/pip.stamp
	@echo "Installing requirements.txt into $(VENV) (one or two minutes, the first time only)."
	@$(PIP) install -r requirements.txt
	@touch $@

$(BEAM)/test.stamp: requirements.txt pyproject.toml $(VENV)/pip.stamp
	@echo "Installing Apache Beam and the test tools into $(BEAM) (one or two minutes, the first time only)."
	@$(BEAM)/bin/python --version >/dev/null 2>&1 || $(PYTHON) -m venv $(BEAM)
	@$(BEAM)/bin/python -m pip --disable-pip-version-check --quiet --quiet install --editable ".[test,curation-beam]"
	@touch $@

$(VENV)/app.stamp: pyproject.toml $(VENV)/requirements.stamp
	@echo "Installing Gradio into $(VENV) (about a minute, the first time only)."
	@$(PIP) install --editable ".[app]"
	@touch $@

$(VENV)/test.stamp: pyproject.toml $(VENV)/requirements.stamp
	@echo "Installing the test tools into $(VENV)."
	@$(PIP) install --editable ".[test]"
	@touch $@
