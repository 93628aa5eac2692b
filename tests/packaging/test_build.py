"""What the build says when the environment does not suit it, and what `make` passes on to it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MAKEFLAGS", "PYTHON", "CXX") and not key.startswith("MOQ_")
    }
    return subprocess.run(
        command, env=inherited | variables, cwd=cwd, text=True, capture_output=True, check=False
    )


def build(**variables: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", **variables)


def program(path: Path, output: str) -> str:
    """Makes a program that prints `output`, whatever it is asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    path.chmod(0o755)
    return str(path)


def test_build_refuses_an_old_torch_before_compiling(tmp_path: Path) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "version.py").write_text("__version__ = '1.13.1'\n")

    result = build(PYTHONPATH=str(tmp_path))

    assert result.returncode != 0
    assert "needs torch >= 2.11, got" in result.stderr
    assert "pip install torch==2.11.0" in result.stderr


def test_build_refuses_a_missing_compiler_before_compiling() -> None:
    result = build(CXX="no-such-compiler")

    assert result.returncode != 0
    assert "'no-such-compiler' is not found: apt install g++" in result.stderr


@pytest.mark.parametrize(
    ("macros", "found"),
    [
        ("#define __GNUC__ 4\n#define __clang_major__ 14", "clang 14"),
        ("#define __GNUC__ 11", "g++ 11"),
        ("nothing", "no g++"),
    ],
)
def test_build_refuses_another_compiler_before_compiling(
    tmp_path: Path, macros: str, found: str
) -> None:
    compiler = program(tmp_path / "c++", macros)

    result = build(CXX=f"env {compiler}")

    assert result.returncode != 0
    assert f"needs g++ >= 12, and 'env {compiler}' is {found}: apt install g++" in result.stderr
    assert "CXX=g++" in result.stderr


def test_build_takes_a_compiler_with_words_before_it() -> None:
    check = "import runpy; runpy.run_path('setup.py')['check_compiler']('env g++')"
    assert run(sys.executable, "-c", check).stderr == ""


@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++")
def test_cmake_refuses_clang_before_compiling(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert cmake is not None
    torch_free = ["-DMOQ_TORCH=OFF", "-DMOQ_CUDA=off"]

    result = run(cmake, "-S", str(ROOT), "-B", str(tmp_path), *torch_free, CXX="clang++")

    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert "moq needs g++ 12 or newer, found Clang" in message
    assert "set CXX=g++ and configure a new build folder" in message


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with this Makefile and an environment of Python 3.12 that needs nothing."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("setup.py", "pyproject.toml", "requirements/data.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for version in ("3.11", "3.12"):
        (tmp_path / f"requirements/lock-{version}.txt").touch()
    program(tmp_path / ".venv/bin/python", "3.12")
    for name in ("installed-3.12", "editable"):
        (tmp_path / ".venv" / name).touch()
    return tmp_path


def test_make_build_configures_again_when_cuda_variables_are_given(checkout: Path) -> None:
    given = run("make", "-n", "build", cwd=checkout, MOQ_CUDA="on", MOQ_CUDA_ARCHITECTURES="80;90a")
    plain = run("make", "-n", "build", cwd=checkout)

    configure = "cmake -B build/cpython-312 -DMOQ_CUDA='on' -DMOQ_CUDA_ARCHITECTURES='80;90a'"
    assert " ".join(given.stdout.split()).count(configure) == 1
    assert "build_info()" in given.stdout
    assert "cmake --build build/cpython-312" in plain.stdout
    assert "cmake -B" not in plain.stdout


def test_make_keeps_to_the_python_of_its_environment(checkout: Path) -> None:
    assert "venv" not in run("make", "-n", "build", cwd=checkout).stdout.replace(".venv", "")


def test_make_remakes_the_environment_for_another_python(checkout: Path) -> None:
    python = program(checkout / "python3.11", "3.11")

    result = run("make", "-n", "build", f"PYTHON={python}", cwd=checkout)

    assert f"{python} -m venv --clear .venv" in result.stdout
    assert "cmake --build build/cpython-311" in result.stdout


def test_make_says_in_one_line_for_what_it_built(checkout: Path) -> None:
    (checkout / ".venv/editable").unlink()

    lines = run("make", "-n", "build", cwd=checkout).stdout.splitlines()

    installs = next(i for i, line in enumerate(lines) if "pip install" in line)
    assert "build_info()" in lines[installs + 1]
