#!/usr/bin/env bash
# What is run on a GPU: the tests before a kernel lands, and the measurements that documents quote.
#
#   tests/gpu.sh                         every part that is not done yet, tests first
#   tests/gpu.sh --build                 build the extension and the C++ tests with CUDA into build/gpu
#   tests/gpu.sh --part tests            kernels (C++; older GPUs' too, and what others are told), operators and training,
#                                        and the engine by an older GPU's path
#   tests/gpu.sh --part engine           the engine: its answers, errors, memory and captures
#   tests/gpu.sh --part ranks            training and engine over NCCL, where there are two GPUs, and training steps
#   tests/gpu.sh --part sanitizer        C++ tests under compute-sanitizer, memcheck over all, initcheck over one in 2,
#                                        racecheck over one in 10, a different selection with each commit
#   tests/gpu.sh --part decode           generation beside compiled PyTorch and transformers
#   tests/gpu.sh --part regions          the fused regions of a layer beside unfused kernels
#   tests/gpu.sh --part gemm             INT8 products beside the read bandwidth and cuBLAS
#   tests/gpu.sh --part encoder          BERT beside transformers in a CUDA graph and compiled PyTorch
#   tests/gpu.sh --part fake_quantize    the training step's kernels, learned scales' too, beside a copy
#   tests/gpu.sh --part train_step       training steps with moq and without
#
# A part takes at most 8 minutes on 16 cores. Its steps (tests/gpu_parts.py --list) append what they find to
# build/gpu/results.jsonl, one JSON object a line with machine, versions and commit; a step that is in there for the
# same machine, build and checkout is not run again, so that a part that was interrupted goes on (--again runs all of it,
# and so does a checkout with changes; --step NAME one; --results FILE writes elsewhere).
#
# A build made elsewhere (the same Python and torch) serves as well: put it in build/gpu, with the commit's name in
# build/gpu/commit. PYTHON names the interpreter (.venv's, where there is one: `make build` makes it),
# MOQ_CUDA_ARCHITECTURES the GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
# By its whole name; cmake and ninja are looked for beside it first.
BIN=$(cd "$(dirname "$(command -v "$PYTHON")")" && pwd)
PYTHON=$BIN/$(basename "$PYTHON")
export PATH="$BIN:$PATH"
BUILD=build/gpu
export PYTHONPATH="$PWD/$BUILD/python${PYTHONPATH:+:$PYTHONPATH}"

build() {
  cmake -S . -B $BUILD -G Ninja -DPython3_EXECUTABLE="$PYTHON" -DMOQ_CUDA=on \
    -DMOQ_CUDA_ARCHITECTURES="${MOQ_CUDA_ARCHITECTURES:-80;90a}" -DMOQ_BUILD_TESTS=ON \
    -DMOQ_OUTPUT_DIRECTORY="$PWD/$BUILD/python/moq"
  cmake --build $BUILD --target _C cpp_tests 2>&1 | tee $BUILD/build.log
  # ptxas only notes it, and the results are the same: no test would tell.
  if grep -q "wgmma.mma_async instructions are serialized" $BUILD/build.log; then
    find $BUILD -name '*wgmma*.cu.o' -delete  # the next build says it again
    echo "products by wgmma wait for each other, as ptxas says above: something writes their registers meanwhile" >&2
    exit 1
  fi
  git describe --always --dirty > $BUILD/commit
}

# The package as an installation lays it out, with links to the sources. (Without a build gpu_parts.py says so.)
package() {
  compgen -G "$BUILD/python/moq/_C*.so" >/dev/null || return 0
  for item in "$PWD"/moq/*.py "$PWD"/moq/integrations; do ln -sfn "$item" $BUILD/python/moq/; done
  ln -sfn "$PWD/inference" $BUILD/python/moq/inference
}

case ${1:-} in
  --build) build ;;
  -h | --help) awk 'NR > 1 && !/^#/ { exit } NR > 1' "$0" | cut -c3- ;;
  # -P keeps the checkout, which has no build for this interpreter, from being imported instead.
  *) package && exec "$PYTHON" -P tests/gpu_parts.py "$@" ;;
esac
