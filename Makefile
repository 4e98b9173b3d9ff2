# Needs Python 3.10 to 3.13 and make. Everything is installed into $(VENV); another interpreter: make PYTHON=python3.12
# On a machine without an NVIDIA GPU the CPU build of PyTorch saves 5 GB:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup

PYTHON ?= python3
VENV ?= .venv
CONVERTER_VENV ?= .venv-onnx2tf
RKNN_VENV ?= .venv-rknn
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --no-compile
DEMO := runs/demo
# One process a core, each of one thread: small models gain nothing from more threads, and lose much by sharing cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile

.PHONY: help setup demo test check campaigns rknn clean

help:
	@echo "make setup   install what the program needs into $(VENV)"
	@echo "make demo    train, validate and detect on the embedded data set (minutes on a CPU)"
	@echo "make test    run all tests"
	@echo "make check   run the linter and the quick tests"
	@echo "make campaigns   fuzzing, interrupted trainings, endurance: about an hour, on a machine with nothing else to do"
	@echo "make rknn    install Rockchip's toolkit into $(RKNN_VENV), for export.py --include rknn (Linux, Python 3.10 to 3.12)"
	@echo "make clean   remove .venv, .venv-onnx2tf, .venv-rknn, runs/demo and tool caches"

setup: $(VENV)/.installed

$(PY):
	@$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), sys.version' || \
		{ echo "Python 3.10 to 3.13 is needed (3.14: see requirements.txt); choose one with: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(PY)
	@echo "Installing requirements.txt into $(VENV): some minutes, PyTorch is large ..."
	$(PIP_INSTALL) -r requirements.txt
	@$(PY) -c 'import cv2' || { echo "OpenCV lacks a system library; on Debian: apt install libgl1 libglib2.0-0"; exit 1; }
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-extras.txt $(VENV)/.installed
	$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

$(CONVERTER_VENV)/.installed: requirements-onnx2tf.txt | $(PY)
	@echo "Installing requirements-onnx2tf.txt into $(CONVERTER_VENV): a minute or two ..."
	$(PY) -m venv $(CONVERTER_VENV)
	$(CONVERTER_VENV)/bin/python -m pip install --disable-pip-version-check --no-compile -r requirements-onnx2tf.txt
	@touch $@

rknn: $(RKNN_VENV)/.installed

# The toolkit's own pin of PyTorch is old and large; the one of $(VENV) serves it, seen through a .pth file.
$(RKNN_VENV)/.installed: requirements-rknn.txt | $(VENV)/.installed
	$(PY) -m venv $(RKNN_VENV)
	$(RKNN_VENV)/bin/python -m pip install --disable-pip-version-check --no-compile --no-deps -r requirements-rknn.txt
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		`$(RKNN_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/torch.pth
	@touch $@

demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(PY) train.py --cfg yolov5n-slimneck-af.yaml --data shapes.yaml --img 256 --epochs 38 --project $(DEMO) --name train
	$(PY) val.py --weights $(DEMO)/train/weights/best.pt --data shapes.yaml --img 320 --project $(DEMO) --name val
	$(PY) detect.py --weights $(DEMO)/train/weights/best.pt --source data/images --img 320 \
		--conf-thres 0.4 --line-thickness 2 --project $(DEMO) --name detect
	@echo
	@echo "Done. Look at"
	@echo "  $(DEMO)/detect/                           the sample images with what was found"
	@echo "  $(DEMO)/train/results.png                 how training went"
	@echo "  $(DEMO)/val/                              curves and the confusion matrix"
	@echo "  $(DEMO)/train/weights/best.pt             the trained model"

test: $(VENV)/.installed-dev $(CONVERTER_VENV)/.installed
	$(PYTEST)

check: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PYTEST) -m "not slow"

campaigns: $(VENV)/.installed-dev
	$(PY) -m tests.campaigns.fuzz --target all
	$(PY) -m tests.campaigns.interruptions --count 200
	$(PY) -m tests.campaigns.endurance
	$(PY) -m tests.campaigns.many_images

clean:
	rm -rf .venv .venv-onnx2tf .venv-rknn $(DEMO) .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
