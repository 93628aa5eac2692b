#!/usr/bin/env bash
# Every format and lint check: lint.sh BIN BUILD (the environment's bin folder, the CMake build folder).
# clang-tidy is slow on libtorch's headers, so it looks at the C++ files and headers that changed since the last
# commit on origin/main (or since the previous commit), and at all sources with LINT_ALL=1.
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
# As it is installed: inference/ is moq.inference.
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/moq"
ln -s "$PWD"/moq/* "$PWD/inference" "$tree/moq"
mypy=$(cd "$bin" && pwd)/mypy
(cd "$tree" && "$mypy" --strict --config-file "$OLDPWD/pyproject.toml" -p moq)

echo "lint: clang-tidy"
if [ "${LINT_ALL:-0}" = 1 ]; then
  changed=$(git ls-files '*.cpp')
else
  base=$(git merge-base HEAD origin/main 2>/dev/null || true)
  [ -n "$base" ] && [ "$base" != "$(git rev-parse HEAD)" ] || base=$(git rev-parse -q --verify HEAD~1 || true)
  base=${base:-$(git hash-object -t tree /dev/null)}
  changed=$(git diff --name-only --diff-filter=d "$base" -- '*.cpp')
  # A header is read where it is included: in the source of its own name, or else in the first that includes it.
  for header in $(git diff --name-only --diff-filter=d "$base" -- '*.h'); do
    users=$(git grep -lF "#include \"$header\"" -- '*.cpp' ':!kernels/cpu/simd' || true)
    own=${header%.h}.cpp
    changed+=$'\n'$(grep -xF "$own" <<<"$users" || head -n 1 <<<"$users")
  done
fi
# Files compiled once per instruction set, and the one that chooses among them, carry gcc flags and names of features
# that clang 14 does not know; the rest is checked as built.
files=$(for file in $(sort -u <<<"$changed"); do
  grep -q "/$file\"" "$build/compile_commands.json" && echo "$file"; done | grep -vE '^kernels/cpu/(simd/|isa\.cpp)' || true)
if [ -n "$files" ]; then
  printf '%s\n' $files | xargs -P "$(nproc)" -n 1 clang-tidy --quiet -p "$build"
fi
echo "lint: clean"
