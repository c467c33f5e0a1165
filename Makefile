# make lab        the three notebooks, top to bottom   (PROFILE=quick|laptop|cifar10|paper)
# make cifar10    the same as make lab PROFILE=cifar10: the original lab's settings, for a GPU
# make notebook   open them in JupyterLab
# make test       lint and tests
# make benchmark  how fast training is, against the plain loop
# make soak       the reliability tests for hours
# make clean      remove what runs have written (checkpoints included) and the environment

PYTHON ?= python3
BIN    := .venv/bin

.PHONY: lab cifar10 notebook test benchmark soak clean

lab: .venv/lab
	$(BIN)/python run_lab.py --profile $(or $(PROFILE),$(LAB_PROFILE),quick)

cifar10:
	$(MAKE) lab PROFILE=cifar10

notebook: .venv/lab
	LAB_PROFILE=$(or $(PROFILE),$(LAB_PROFILE)) $(BIN)/jupyter lab

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q

benchmark: .venv/lab
	$(BIN)/python -m benchmarks.train_speed

soak: .venv/dev
	$(BIN)/python -m pytest -m reliability --soak

# Each environment file is made anew when its requirements change.
.venv/lab: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/lab
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

clean:
	rm -rf .venv checkpoints/*/ figures/quick .pytest_cache .ruff_cache .hypothesis
