#!/usr/bin/env bash
# Names what Debian must provide and how to get it, before any work is done.
#   check_prerequisites.sh PYTHON    a compiler, make, Python's headers and venv
#   check_prerequisites.sh --gtest   GoogleTest's libraries (installed here when run as root)
#   check_prerequisites.sh --browser Chromium (likewise, on Debian); without it the tests that need it are skipped
set -euo pipefail

die() { echo "moq: $*" >&2; exit 1; }

if [ "$1" = --gtest ]; then
  [ -e /usr/include/gtest/gtest.h ] && exit 0
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libgtest-dev
    exit 0
  fi
  die "the C++ tests need GoogleTest: sudo apt-get install libgtest-dev"
fi

if [ "$1" = --browser ]; then
  command -v chromium chromium-browser google-chrome >/dev/null && exit 0
  # Ubuntu's package is only a stub for snap.
  if [ "$(id -u)" = 0 ] && grep -qs '^ID=debian' /etc/os-release; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      chromium fonts-dejavu-core >/dev/null && exit 0
  fi
  echo "moq: no Chromium: the tests of moq report in a browser are skipped (sudo apt-get install chromium)" >&2
  exit 0
fi

python=$1
command -v "$python" >/dev/null || die "'$python' is not found: sudo apt-get install python3 python3-dev python3-venv"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
  3.11 | 3.12) ;;
  *) die "needs Python 3.11 or 3.12, got $version: make PYTHON=python3.12" ;;
esac
"$python" -c 'import ensurepip, venv' 2>/dev/null || die "Python's venv is missing: sudo apt-get install python$version-venv"
header=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h
[ -e "$header" ] || die "Python's headers are missing ($header): sudo apt-get install python$version-dev"
read -ra compiler <<<"${CXX:-g++}"  # it may have words before it: ccache g++
command -v "${compiler[0]}" >/dev/null || die "no C++ compiler '${compiler[*]}': sudo apt-get install g++, then make CXX=g++"
major=$("${compiler[@]}" -dumpversion | cut -d. -f1)
if ! "${compiler[@]}" --version | grep -qi 'free software foundation' || [ "$major" -lt 12 ]; then
  die "needs g++ 12 or newer, got '${compiler[*]}' $major: sudo apt-get install g++, then make CXX=g++"
fi
