#!/usr/bin/env bash
# What must be run on a GPU before a kernel lands: each part takes minutes and prints its own summary.
#
#   tests/gpu.sh --build                 build the extension and the C++ tests with CUDA into build/gpu
#   tests/gpu.sh --part kernels          C++ kernel tests on the GPU
#   tests/gpu.sh --part sanitizer        the same under compute-sanitizer: memcheck, racecheck, initcheck
#   tests/gpu.sh --part ops              operator tests of tests/ops on the GPU
#   tests/gpu.sh --part training         the optimizer on the GPU: same bits, no synchronisation, graphs
#   tests/gpu.sh --part bench            bandwidth of the CUDA kernels beside a copy
#
# -P keeps the checkout, which has no build for this interpreter, from being imported instead.
# A build made elsewhere (the same Python and torch) serves as well: put it in build/gpu.
# PYTHON names the interpreter, MOQ_CUDA_ARCHITECTURES the GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
BUILD=build/gpu
export PYTHONPATH="$PWD/$BUILD/python${PYTHONPATH:+:$PYTHONPATH}"

build() {
  cmake -S . -B $BUILD -G Ninja -DPython3_EXECUTABLE="$(command -v "$PYTHON")" -DMOQ_CUDA=on \
    -DMOQ_CUDA_ARCHITECTURES="${MOQ_CUDA_ARCHITECTURES:-80;90a}" -DMOQ_BUILD_TESTS=ON \
    -DMOQ_OUTPUT_DIRECTORY="$PWD/$BUILD/python/moq"
  cmake --build $BUILD --target _C cpp_tests
  package
}

# The package as an installation lays it out, with links to the sources.
package() {
  mkdir -p $BUILD/python/moq
  for file in "$PWD"/moq/*.py; do ln -sfn "$file" $BUILD/python/moq/; done
  ln -sfn "$PWD/inference" $BUILD/python/moq/inference
}

part() {
  local tests=$BUILD/tests/cpp/moq_kernels_test
  case $1 in
    kernels) $tests --gtest_brief=1 --gtest_filter='*Cuda*:*CUDA*:*cuda*' ;;
    sanitizer)
      for tool in memcheck racecheck initcheck; do
        echo "== compute-sanitizer --tool $tool"
        # Of linear's tests one for each case: under racecheck the whole of them takes too long.
        compute-sanitizer --tool $tool --error-exitcode 9 $tests --gtest_brief=1 \
          --gtest_filter='*Cuda*:*CUDA*:*cuda*:-*Huge*:*LinearCuda.Reads*:*LinearCuda.Gives*' | tail -n 5
      done
      ;;
    ops) package && "$PYTHON" -P -m pytest -q -rs -p no:cacheprovider tests/ops -k 'cuda or gpu' ;;
    training) package && "$PYTHON" -P -m pytest -q -rs -p no:cacheprovider tests/training/test_optimizer_cuda.py ;;
    bench) package && "$PYTHON" tests/benchmarks/fake_quantize.py --device cuda ;;
    *) echo "unknown part '$1'; see the top of $0" >&2; exit 2 ;;
  esac
}

case ${1:-} in
  --build) build ;;
  --part) part "${2:?name a part}" ;;
  *) sed -n '2,12p' "$0"; exit 2 ;;
esac
