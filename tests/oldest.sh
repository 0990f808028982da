#!/usr/bin/env bash
# The wheel that a user would install, in an empty environment of the oldest Python at hand and the oldest PyTorch that is
# supported: the console command trains there with compiled kernels, and the ops' tests pass. tests/oldest.sh PYTHON
set -euo pipefail
case $1 in /*) python=$1 ;; *) python=$PWD/$1 ;; esac        # it stays valid in another folder
for older in python3.10 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python; do
    if "$older" -c "import venv" 2> /dev/null; then python=$older; fi
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export EMPSSL_CUDA=0                                         # CPU kernels, with or without nvcc
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/building"
"$scratch/building/bin/python" -m pip install --quiet build
"$scratch/building/bin/python" -m build --wheel --outdir "$scratch" . > "$scratch/log" 2>&1 || { cat "$scratch/log"; exit 1; }

"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet "torch==2.10.*" "torchvision==0.25.*" "$scratch"/empssl-*.whl
mkdir "$scratch/empty"
cd "$scratch/empty"
"$scratch/venv/bin/python" -c "import sys, torch, empssl; print(f'Python {sys.version.split()[0]}, torch {torch.__version__}: {empssl.__file__}')"
"$scratch/venv/bin/empssl" --dataset shapes --subset 500 --device cpu --patches 2 --eval-patches 4 --name wheel | tee said
grep -q "extract_patches: compiled" said
grep -q "logdet_spd: compiled" said
test -f runs/wheel/encoder.pt

cd "$OLDPWD"
"$scratch/venv/bin/python" -m pip install --quiet pytest pytest-timeout hypothesis
"$scratch/venv/bin/python" -m pytest -p no:cacheprovider tests/test_ops.py tests/test_patches.py tests/test_loss.py tests/test_lars.py
