#!/bin/sh
# Runs the operators' tests on kernels built with the address and undefined-behaviour sanitizers.
#   scripts/sanitize_ops.sh [pytest arguments]        PYTHON=... chooses the interpreter
# Needs GCC (Linux). Tests that compile graphs or start processes are left out: they test PyTorch's
# machinery, which is not what is looked at here, and take minutes under a sanitizer.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
library=$(pwd)/build/sanitize/_kernels.so
mkdir -p "$(dirname "$library")"
CXX=${CXX:-g++} "$python" -m recsys_ssm.ops.build --sanitize --cache build/sanitize --output "$library"
export LD_PRELOAD="$("${CXX:-g++}" -print-file-name=libasan.so):$("${CXX:-g++}" -print-file-name=libubsan.so)"
# Leaks: the interpreter's own would drown ours.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export RECSYS_SSM_LIBRARY="$library"
if [ $# -eq 0 ]; then
  set -- -q tests/ops -p no:cacheprovider --ignore tests/ops/test_dispatch.py \
    -k "not compile and not opcheck and not export and not fork and not callers"
fi
exec "$python" -m pytest "$@"
