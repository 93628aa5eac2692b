"""What `import moq` and the build say when the environment does not suit them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )


def test_import_beside_the_other_package_named_moq_names_it(tmp_path: Path) -> None:
    info = tmp_path / "moq-0.9.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moq\nVersion: 0.9.3\n")

    result = run_python("-c", "import moq", path=tmp_path)

    assert result.returncode != 0
    assert "the PyPI package 'moq' 0.9.3" in result.stderr
    assert "pip uninstall -y moq torch-moq" in result.stderr


def test_import_without_torch_says_how_to_get_an_environment(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")

    result = run_python("-c", "import moq", path=tmp_path)

    assert result.returncode != 0
    assert "make build" in result.stderr


def test_build_refuses_an_old_torch_before_compiling(tmp_path: Path) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "version.py").write_text("__version__ = '1.13.1'\n")

    result = run_python("setup.py", "build_ext", "--inplace", path=tmp_path)

    assert result.returncode != 0
    assert "needs torch >= 2.11, got" in result.stderr
    assert "pip install torch==2.11.0" in result.stderr


def test_build_refuses_a_missing_compiler_before_compiling() -> None:
    environment = os.environ | {"CXX": "no-such-compiler"}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        env=environment,
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )

    assert result.returncode != 0
    assert "'no-such-compiler' is not found: apt install g++" in result.stderr
