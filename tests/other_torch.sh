#!/usr/bin/env bash
# The build at hand, not built again, under the oldest PyTorch that is supported: tests/other_torch.sh PYTHON
set -euo pipefail
case $1 in /*) python=$1 ;; *) python=$PWD/$1 ;; esac        # it stays valid in another folder
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet "torch==2.10.*" "torchvision==0.25.*" tqdm numpy pillow filelock \
    pytest pytest-timeout hypothesis
for each in "$python" "$venv/bin/python"; do
    "$each" -c "import torch, _empssl; print(f'torch {torch.__version__}: {_empssl.__file__}')"
done
"$venv/bin/python" -m pytest -p no:cacheprovider tests/test_ops.py tests/test_patches.py tests/test_loss.py tests/test_lars.py
