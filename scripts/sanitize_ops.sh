#!/bin/sh
# Run the operators' tests on kernels built with the address and undefined-behaviour sanitizers.
#   scripts/sanitize_ops.sh [pytest arguments]        PYTHON=... chooses the interpreter
# Needs GCC (Linux). Leaves out the tests that compile graphs or start processes: they test PyTorch, and take minutes
# under a sanitizer.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
library=$(pwd)/build/sanitize/_kernels.so
CXX=${CXX:-g++} "$python" -m cmake -S . -B build/sanitize -DRECSYS_SSM_SANITIZE=ON
"$python" -m cmake --build build/sanitize --parallel
export LD_PRELOAD="$("${CXX:-g++}" -print-file-name=libasan.so):$("${CXX:-g++}" -print-file-name=libubsan.so)"
# The interpreter's own leaks would hide ours.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export RECSYS_SSM_LIBRARY="$library"
if [ $# -eq 0 ]; then
  set -- -q tests/ops -p no:cacheprovider --ignore tests/ops/test_dispatch.py \
    -k "not compile and not opcheck and not export and not fork and not callers"
fi
exec "$python" -m pytest "$@"
