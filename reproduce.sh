#!/usr/bin/env bash
# bash reproduce.sh            set up, train, probe, draw: CIFAR-10 if it is there or can be downloaded, else shapes
# bash reproduce.sh test       set up, check the style, run the tests
# bash reproduce.sh test-long  the same with the tests that take minutes, sanitizers, and the wheel on the oldest PyTorch supported
# bash reproduce.sh gpu        on a machine with a GPU: the ops' tests, compute-sanitizer, the ops' benchmark, a step's parts
# bash reproduce.sh cifar10|cifar100|tinyimagenet|imagenet100    the paper's tables: 1, 10, 30 epochs of 20 and 200 patches
# bash reproduce.sh laptop|patches|network|transfer|kmeans    the other tables; all go on where they were cut off (--help says more)
# bash reproduce.sh methods    the methods' speed, their search and their comparison; then minutes and claims can run, the same way
# bash reproduce.sh tables     write the tables of README.md and docs/ anew from study/results/
# The Python in use serves as it is if it has all that is needed (then no network is needed either);
# else .venv is made here, on top of that Python's torch and torchvision if it has them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
command=${1:-main}

has() { "$PY" -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))" "$@"; }

setup() {                                           # setup EXTRAS MODULE...: leaves the Python to use in $PY
    local extras=$1 site=
    shift
    PY=.venv/bin/python
    [ -x "$PY" ] || PY=$(command -v "${PYTHON:-python3}") || { echo "error: there is no python3; install Python 3.10 or newer." >&2; exit 2; }
    if has torch torchvision tqdm filelock "$@"; then       # the compiled ops too, where they are missing and can be built
        has _empssl || ! has pybind11 ninja setuptools || build
        return
    fi
    if [ "$PY" != .venv/bin/python ]; then
        has torch torchvision && site=--system-site-packages
        echo "making .venv with what is missing"
        "$PY" -m venv $site .venv
        PY=.venv/bin/python
    fi
    "$PY" -m pip install --quiet --editable ".[$extras]"
}

build() {                                           # the compiled ops, in place; into .venv by pip where it must fetch nvcc for it
    if [ "$PY" = .venv/bin/python ] && "$PY" -c "import build_backend as b, sys; sys.exit(not b.cuda_wheels())"; then
        "$PY" -m pip install --quiet --no-deps --editable . && return
    fi
    "$PY" setup.py --quiet build_ext --inplace      # nothing to do where it is up to date
}

setup_tests() {
    setup dev,figures pytest pytest_timeout hypothesis ruff matplotlib sklearn bokeh pybind11 ninja setuptools
    build
}

case $command in
main)
    setup figures matplotlib sklearn bokeh
    if "$PY" -c "import empssl; empssl.load_dataset('cifar10')" > /dev/null 2>&1; then
        dataset=cifar10 recipe=
        echo "CIFAR-10 is at hand: training on it"
    else
        dataset=shapes recipe="--augmentation paper"            # colour must not name them
        echo "CIFAR-10 is not in data/ and cannot be downloaded: training on shapes, drawn in memory"
    fi
    "$PY" empssl.py --dataset "$dataset" $recipe
    ;;
test)
    setup_tests
    "$PY" -m ruff check
    "$PY" -m pytest
    ;;
test-long)
    setup_tests
    "$PY" -m ruff check
    "$PY" -m pytest -m "slow or not slow"
    bash tests/sanitize.sh "$PY"
    bash tests/oldest.sh "$PY"
    ;;
gpu)
    setup dev pytest pytest_timeout hypothesis pybind11 ninja setuptools
    "$PY" -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || { echo "error: PyTorch sees no GPU here; run this where there is one." >&2; exit 2; }
    build
    "$PY" -m pytest tests/test_ops.py
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --kernel-regex 'kns=(extract_patches|logdet_spd)_kernel' --report-api-errors no --error-exitcode 1 \
            "$PY" -m pytest --timeout 1200 tests/test_ops.py -k "cuda and (papers or alone or sizes)"
    done
    "$PY" -m study.benchmarks.ops --device cuda
    "$PY" -m study.benchmarks.step --preset paper
    "$PY" -m study.experiments.tables
    ;;
cifar10|cifar100|tinyimagenet|imagenet100)
    setup figures matplotlib sklearn bokeh
    "$PY" -m study.experiments.paper "$command" "${@:2}"
    "$PY" -m study.experiments.tables
    ;;
methods|claims)
    setup figures matplotlib sklearn bokeh
    for part in speed search compare; do
        "$PY" -m "study.experiments.$command" "$part" "${@:2}"
    done
    "$PY" -m study.experiments.tables
    ;;
laptop|minutes|patches|network|transfer)
    setup figures matplotlib sklearn bokeh
    "$PY" -m "study.experiments.$command" "${@:2}"
    "$PY" -m study.experiments.tables
    ;;
kmeans)
    setup figures matplotlib sklearn bokeh
    for centroids in 1600 4000; do
        for seed in 0 1 2; do
            "$PY" -m study.baselines.kmeans --centroids "$centroids" --seed "$seed" "${@:2}"
        done
    done
    "$PY" -m study.experiments.tables
    ;;
tables)
    setup figures matplotlib sklearn bokeh
    "$PY" -m study.experiments.tables
    "$PY" -m study.experiments.plot
    ;;
*)
    echo "error: there is no command '$command'; the commands are: (none), test, test-long, gpu, cifar10, cifar100, tinyimagenet, imagenet100, laptop, methods, claims, minutes, patches, network, transfer, kmeans, tables." >&2
    exit 2
    ;;
esac
