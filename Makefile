# make lab        the three notebooks, top to bottom
# make notebook   open them in JupyterLab
# make test       lint and tests
# make handin     a run's report and archive, as the course asks for it  (STUDENT=RE6121011)
# make check      look through archives that were handed in  (ZIP=a file or a folder)
# make student    the notebooks with blanks to fill in, for teachers
# make sweep      every λ at every ratio, with several seeds
# make benchmark  how fast training is, against the plain loop
# make soak       the reliability tests for hours
# make coverage   the lines that no test runs
# make clean      remove the environment, caches and figures of test runs
# make clean-checkpoints  remove the checkpoints of every run, after a question
#
# PROFILE=quick|laptop|cifar10|paper   LAB_DATA=a folder of images   LAB_EPOCHS=10   RUN=a name
# LAB_DEVICE=cpu|cuda|cuda:1|mps
# Without PROFILE `make lab` is quick, whose images need no network (a sweep on a GPU: cifar10).

PYTHON ?= python3
BIN    := .venv/bin

# What is typed goes on as it is, through the environment: neither make nor a shell expands it.
TYPED := PROFILE RUN STUDENT ZIP LAB_PROFILE LAB_RUN LAB_DATA LAB_EPOCHS LAB_DEVICE LAB_CLUSTER
as_it_is = $(if $(filter command,$(origin $1)),$(eval override export $1 := $$(value $1)))
$(foreach name,$(TYPED),$(call as_it_is,$(name)))
ifdef PROFILE
export LAB_PROFILE := $(value PROFILE)
endif
ifdef RUN
export LAB_RUN := $(value RUN)
endif
# What would change how Python and matplotlib behave stays with the shell that set it.
unexport PYTHONPATH PYTHONHOME PYTHONSAFEPATH PYTHONSTARTUP PYTHONOPTIMIZE PYTHONWARNINGS
unexport MPLBACKEND MATPLOTLIBRC
# $(call needed,ZIP): an error that says how to give ZIP, if it is missing.
needed = $(if $(value $1),,$(error $1 is missing: make $@ $1=…))

.PHONY: lab notebook test handin check student sweep benchmark soak coverage
.PHONY: clean clean-checkpoints

lab: .venv/lab
	$(BIN)/python -m utils.run.notebooks

notebook: .venv/lab
	$(BIN)/jupyter lab

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q --numprocesses auto --dist loadfile --no-loadscope-reorder

handin: .venv/handin
	$(call needed,STUDENT)$(BIN)/python -m coursework.hand_in "$$STUDENT"

check: .venv/lab
	$(call needed,ZIP)$(BIN)/python -m coursework.check "$$ZIP"

student: .venv/lab
	$(BIN)/python -m coursework.student

sweep: .venv/lab
	$(BIN)/python -m sweep

benchmark: .venv/lab
	$(BIN)/python -m benchmarks.train_speed

soak: .venv/dev
	$(BIN)/python -m pytest -m reliability --soak

coverage: .venv/dev
	$(BIN)/python -m pytest -q --cov=models --cov=utils --cov=coursework --cov=sweep --cov-report=term-missing

# Each environment file is made anew when one of its requirements files changes.
.venv/lab: requirements.txt requirements-export.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed; if it has another name: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(addprefix --requirement ,$^)
	touch $@

.venv/dev: requirements-dev.txt requirements-handin.txt .venv/lab
	$(BIN)/python -m pip install --quiet --requirement $<
	touch $@

.venv/handin: requirements-handin.txt .venv/lab
	$(BIN)/python -m pip install --quiet --requirement $<
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .coverage figures/smoke*
	find models utils coursework sweep tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# Of a link only the link goes, not the folder that it points to.
RUNS := find checkpoints -mindepth 1 -maxdepth 1 ! -name .gitkeep
clean-checkpoints:
	@$(RUNS) -exec du -sh {} +
	@printf 'Remove all of these? (y/N) '; read -r answer; \
	case "$$answer" in [yY]*) $(RUNS) -exec rm -rf {} + ;; *) echo 'Nothing was removed.' ;; esac
