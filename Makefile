# Each target works alone on a fresh machine with Python 3.11 or newer; nothing but this folder and .venv is touched.

PYTHON ?= python3
VENV ?= .venv
EXPORT_PIP := PIP_CONSTRAINT=$(CURDIR)/constraints/dev.txt PIP_DISABLE_PIP_VERSION_CHECK=1

.PHONY: demo test lint types bench clean

demo: $(VENV)/.demo
	$(VENV)/bin/offramp demo

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -q -m "not slow"
	$(VENV)/bin/python -m pytest -q -m slow

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .

types: $(VENV)/.dev
	$(VENV)/bin/mypy

BENCHMARKS := "cifar10.py --time-budget 900 --out results/cifar10.json" \
	"optimized.py --time-budget 600 --out results/optimized_cifar10.json" \
	"tiny_imagenet.py mobilenet_v2 --time-budget 420 --out results/mobilenet_v2.json" \
	"tiny_imagenet.py resnet56 --time-budget 400 --out results/resnet56_cifar100.json" \
	"learning_curve.py --time-budget 120 --out results/learning_curve.json" \
	"overhead.py --out results/overhead.json" "merging.py --out results/merging.json" \
	"scale.py --out results/scale.json" "detection_delay.py --out results/detection_delay.json" \
	"split_table.py --out results/split_table.json" \
	"online.py cold --workdir work --out results/online_cold.json" \
	"online.py drift --both --workdir work --out results/online_drift.json" \
	"online.py faults --workdir work --out results/online_faults.json" \
	"online.py threads --workdir work --out results/online_threads.json" \
	"online.py cost --workdir work --out results/online_cost.json" \
	"methods.py cifar10 --time-budget 650 --latency-budget 3 --workdir work --out results/methods_cifar10.json" \
	"methods.py resnet56_cifar10 --time-budget 280 --latency-budget 2 --workdir work --out results/methods_resnet56_cifar10.json" \
	"ablations.py cifar10 --time-budget 650 --workdir work --out results/ablations.json" \
	"breaches.py --out results/breaches.json" "replication.py work/cifar10 --out results/replication.json" "render.py"

# Opponents that are not installed (extra `bench`) are rows that say so.
bench: $(VENV)/.dev
	cd benchmarks && for run in $(BENCHMARKS); do echo "== $$run"; $(abspath $(VENV))/bin/python $$run || exit 1; done

clean:
	rm -rf $(VENV) demo .mypy_cache .pytest_cache .ruff_cache

# The stamps say which extras are installed; a changed pyproject.toml installs anew.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints/dev.txt | $(VENV)/bin/python
	$(EXPORT_PIP) $(VENV)/bin/python -m pip install --quiet -e '.[$*]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
