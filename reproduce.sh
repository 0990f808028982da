#!/usr/bin/env bash
# bash reproduce.sh          set up, train, probe, draw: CIFAR-10 if it is there or can be downloaded, else shapes
# bash reproduce.sh test     set up, run the tests
# bash reproduce.sh test-long  the same, and the CPU ops under sanitizers and under the oldest PyTorch supported (downloaded)
# bash reproduce.sh cifar10|cifar100|tinyimagenet|imagenet100    the paper's tables: 1, 10, 30 epochs of 20 and 200 patches
# bash reproduce.sh transfer   CIFAR-10's encoder on CIFAR-100 and back, or --from FOLDER --to FOLDER
# bash reproduce.sh ablation   patches, batch, lambda, LARS
# bash reproduce.sh peers      every method of baselines.py, at equal epochs and at equal seconds
# bash reproduce.sh laptop     the README's first table: preset laptop for ten minutes, the same with all labels, and for an hour
#                              (--search [TRY ...]: the tries that preset laptop was chosen by, those without a record)
#                              these take --seeds N, --subset N (a rehearsal), --anyway (on a CPU) and go on where they were cut off
# bash reproduce.sh speed      the official way, presets paper and fast on one GPU: patches/s, a step's parts, seconds to 80, 85, 90 %
#                              (--search: the tries for preset fast; --rehearse: small, and on a CPU)
# bash reproduce.sh figures    README's tables and pictures anew, from results/
# bash reproduce.sh all        those that need no folder of yours, one after the other
# bash reproduce.sh gpu        on a machine with a GPU: the ops' and a training step's tests, compute-sanitizer, the ops' benchmark, a step's parts
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
    if has torch torchvision tqdm threadpoolctl "$@"; then  # the compiled ops too, where they are missing and can be built
        has _empssl || ! has pybind11 ninja setuptools || "$PY" setup.py --quiet build_ext --inplace
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

case $command in
main)
    setup figures matplotlib sklearn
    if "$PY" -c "import empssl_io as io; io.load_dataset('cifar10')" 2> /dev/null; then
        dataset=cifar10 recipe=
        echo "CIFAR-10 is at hand: training on it"
    else
        dataset=shapes recipe="--augmentation paper"            # colour must not name them
        echo "CIFAR-10 is not in data/ and cannot be downloaded: training on shapes, drawn in memory"
    fi
    name=$dataset-$(date +%Y%m%d-%H%M%S)
    "$PY" empssl.py --dataset "$dataset" $recipe --name "$name"
    "$PY" report.py "runs/$name"
    ;;
test|test-long)
    setup dev,figures pytest hypothesis matplotlib sklearn pybind11 ninja setuptools
    "$PY" setup.py --quiet build_ext --inplace      # nothing to do where it is up to date
    "$PY" -m pytest
    if [ "$command" = test-long ]; then
        bash tests/sanitize.sh "$PY"
        bash tests/other_torch.sh "$PY"
    fi
    ;;
cifar10|cifar100|tinyimagenet|imagenet100|transfer|ablation|peers)
    setup figures matplotlib sklearn
    "$PY" benchmarks/evidence.py "$command" "${@:2}"
    "$PY" report.py --readme
    ;;
laptop)
    setup figures matplotlib sklearn
    if [ "${2:-}" = --search ]; then "$PY" benchmarks/laptop.py "${@:3}"; else "$PY" benchmarks/evidence.py laptop "${@:2}"; fi
    "$PY" report.py --readme
    ;;
speed)
    setup figures matplotlib sklearn
    "$PY" benchmarks/speed.py "${@:2}"
    "$PY" report.py --readme
    ;;
figures)
    setup figures matplotlib sklearn
    "$PY" report.py --peers
    "$PY" report.py --readme
    ;;
all)
    status=0
    for each in main cifar10 cifar100 transfer ablation peers laptop speed figures; do
        bash "$0" "$each" "${@:2}" || status=$?     # one that is refused here says why
    done
    exit $status
    ;;
gpu)
    setup dev pytest hypothesis pybind11 ninja setuptools
    "$PY" -c "import torch, sys; sys.exit(not torch.cuda.is_available())" || { echo "error: PyTorch sees no GPU here; run this where there is one." >&2; exit 2; }
    "$PY" setup.py --quiet build_ext --inplace
    "$PY" -m pytest tests/test_ops.py
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --kernel-regex 'kns=(extract_patches|logdet_spd)_kernel' --report-api-errors no --error-exitcode 1 \
            "$PY" -m pytest tests/test_ops.py -k "cuda and (papers or alone or sizes)"
    done
    "$PY" benchmarks/ops.py --device cuda
    for preset in paper fast; do "$PY" benchmarks/step.py --preset "$preset"; done
    "$PY" report.py --readme
    ;;
*)
    echo "error: there is no command '$command'; the commands are: (none), test, test-long, cifar10, cifar100, tinyimagenet, imagenet100, transfer, ablation, peers, laptop, speed, figures, all, gpu." >&2
    exit 2
    ;;
esac
