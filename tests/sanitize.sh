#!/usr/bin/env bash
# Build and run the CPU ops under AddressSanitizer and UBSan, in a folder of its own: tests/sanitize.sh PYTHON
set -euo pipefail
case $1 in /*) python=$1 ;; *) python=$PWD/$1 ;; esac        # it stays valid in another folder
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cp -r setup.py build_backend.py pyproject.toml README.md csrc empssl.py empssl_support tests "$build"
cd "$build"
flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
export EMPSSL_CUDA=0
CXXFLAGS="$flags" LDFLAGS="-fsanitize=address,undefined" "$python" setup.py --quiet build_ext --inplace
# torch.compile and multiprocessing start programs that cannot live under a preloaded sanitizer.
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
    "$python" -m pytest -p no:cacheprovider --timeout 1200 tests/test_ops.py \
    --deselect tests/test_ops.py::test_pytorch_sees_the_ops_whole
