#!/usr/bin/env bash
# Every format and lint check: lint.sh BIN BUILD (the environment's bin folder, the CMake build folder).
# clang-tidy is slow on libtorch's headers, so it looks at the C++ files that changed since the last commit on
# origin/main (or since the previous commit), and at all of them with LINT_ALL=1.
set -euo pipefail
bin=$1 build=$2
for tool in clang-format clang-tidy; do
  if ! command -v $tool >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
      apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq clang-format clang-tidy
    else
      echo "make lint needs clang-format and clang-tidy: sudo apt-get install clang-format clang-tidy" >&2
      exit 1
    fi
  fi
done

echo "lint: layers"
if git grep -nE '#include *[<"](torch|ATen|c10|pybind11|Python)' -- kernels csrc/schedule csrc/hessian/solvers inference/checkpoint; then
  echo "these folders are torch-free" >&2
  exit 1
fi
if git ls-files '*.cu' '*.cuh' | grep -vE '^(kernels|tests)/'; then
  echo "CUDA files live in kernels/" >&2
  exit 1
fi

echo "lint: clang-format"
git ls-files '*.cpp' '*.cc' '*.h' '*.cu' '*.cuh' | xargs -r clang-format --dry-run --Werror

echo "lint: ruff"
"$bin/ruff" check .
"$bin/ruff" format --check .

echo "lint: mypy"
"$bin/mypy" --strict -p moq

echo "lint: clang-tidy"
if [ "${LINT_ALL:-0}" = 1 ]; then
  changed=$(git ls-files '*.cpp')
else
  base=$(git merge-base HEAD origin/main 2>/dev/null || true)
  [ -n "$base" ] && [ "$base" != "$(git rev-parse HEAD)" ] || base=$(git rev-parse -q --verify HEAD~1 || true)
  changed=$(git diff --name-only --diff-filter=d ${base:-$(git hash-object -t tree /dev/null)} -- '*.cpp')
fi
# Files compiled once per instruction set carry gcc flags that clang 14 reads differently; the rest is checked as built.
files=$(for file in $changed; do grep -q "/$file\"" "$build/compile_commands.json" && echo "$file"; done | grep -v '^kernels/cpu/simd/' || true)
if [ -n "$files" ]; then
  printf '%s\n' $files | head -n "${LINT_FILES:-12}" | xargs -P "$(nproc)" -n 1 clang-tidy --quiet -p "$build"
fi
echo "lint: clean"
