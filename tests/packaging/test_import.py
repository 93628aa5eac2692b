"""What `import moq` says when the environment does not suit it."""

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


def test_a_clone_that_hides_the_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "moq").mkdir()
    (tmp_path / "moq" / "inference").symlink_to(ROOT / "inference")

    result = run_python("-S", "-P", "-c", "import moq.inference", path=tmp_path)

    assert result.returncode != 0
    assert f"got the folder {tmp_path / 'moq'}: start Python in another directory" in result.stderr


def test_what_is_loaded_at_its_first_use_is_listed_and_the_command_says_its_version() -> None:
    listed = run_python("-c", "import moq; print(set(moq.__all__) - set(dir(moq)))")
    assert listed.stdout.strip() == "set()", listed.stderr
    version = run_python("-m", "moq", "--version")
    assert version.stdout.startswith("moq 0."), version.stderr


def test_errors_of_the_extension_are_public() -> None:
    result = run_python("-c", "from moq.inference import Engine; Engine.from_pretrained('nowhere')")
    assert "\nmoq.Error: " in result.stderr, result.stderr
