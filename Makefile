# The commands of a newcomer. `make help` lists them with the variables they take.
# ENV is not taken from the shell, where others mean a start-up file or a module by it.
PYTHON ?= python3
ENV = .venv
TORCH ?=
TORCH_INDEX ?=
DEMO ?= work_dirs/demo
RUN = $(ENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint

help:
	@echo "make setup      install everything into ENV (10-15 minutes the first time: mmcv's operators are compiled)"
	@echo "make demo       make a phantom DeepLesion, train and test AlignShift Mask R-CNN on it, and find"
	@echo "                the lesions of a whole phantom CT (4 to 15 minutes on 2 cores)"
	@echo "make test       run the tests"
	@echo "make test-slow  run the tests that make test leaves out: slow ones, and those that repeat a faster one"
	@echo "make lint       check the style with ruff"
	@echo
	@echo "ENV=$(ENV)          environment to use: the repository's own, or yours (ENV=\$$CONDA_PREFIX)"
	@echo "PYTHON=$(PYTHON)     Python that makes the environment"
	@echo "TORCH=           requirement for torch other than the pinned one (TORCH='torch==2.12.0')"
	@echo "TORCH_INDEX=     package index to take torch from (a CUDA or CPU build of your choice)"
	@echo "DEMO=$(DEMO)  folder of the demo"

setup:
	@$(PYTHON) scripts/setup_env.py --env "$(ENV)" --torch "$(TORCH)" --torch-index "$(TORCH_INDEX)"

demo: setup
	$(RUN) tools/make_phantom.py "$(DEMO)/phantom" --patients 300 --size 128 --workers 2
	$(RUN) tools/prepare_data.py "$(DEMO)/phantom"
	DEEPLESION_ROOT="$(DEMO)/phantom" $(RUN) tools/train.py configs/demo/alignshift_3slice.py \
	    --work-dir "$(DEMO)/training" --resume
	DEEPLESION_ROOT="$(DEMO)/phantom" $(RUN) tools/test.py configs/demo/alignshift_3slice.py \
	    "$(DEMO)/training" --work-dir "$(DEMO)/test" --show-dir "$(DEMO)/pictures"
	$(RUN) tools/make_phantom.py --scans "$(DEMO)/scans" --patients 1 --size 128
	$(RUN) tools/detect.py "$(DEMO)/scans/dicom/phantom_001" --config configs/demo/alignshift_3slice.py \
	    --checkpoint "$(DEMO)/training" --out "$(DEMO)/lesions"

test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
