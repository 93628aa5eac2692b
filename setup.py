"""Builds the extension with CMake. Metadata is in pyproject.toml; this file only connects the two.

Environment:
    MOQ_CUDA                 auto (default), on or off
    MOQ_CUDA_ARCHITECTURES   default "80;90a"
    MOQ_BUILD_TESTS          1 also builds the C++ tests (target cpp_tests)
    CXX                      default g++ (12 or newer; no other compiler)
    MAX_JOBS                 parallel compile jobs, default: the number of cores
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_MINIMUM = (2, 11)


def require(condition: bool, message: str) -> None:
    """Stops the build with one line that says what is missing and how to get it."""
    if not condition:
        sys.exit(f"moq: {message}")


def check_compiler(command: str) -> None:
    """Refuses anything but g++ >= 12; `command` may have words before it ("ccache g++")."""
    words = shlex.split(command)
    require(
        bool(words) and shutil.which(words[0]) is not None,
        f"needs g++ >= 12, and '{command}' is not found: apt install g++, then CXX=g++",
    )
    macros = subprocess.run(
        [*words, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=False
    ).stdout
    version = re.search(r"#define __GNUC__ (\d+)", macros)
    clang = re.search(r"#define __clang_major__ (\d+)", macros)
    found = f"clang {clang[1]}" if clang else f"g++ {version[1]}" if version else "no g++"
    require(
        version is not None and clang is None and int(version[1]) >= 12,
        f"needs g++ >= 12, and '{command}' is {found}: apt install g++, then CXX=g++",
    )


def check_build_environment() -> None:
    """Refuses an unsuitable Python, torch or compiler before anything is compiled."""
    require(
        (3, 11) <= sys.version_info[:2] <= (3, 12),
        f"needs Python 3.11 or 3.12, got {sys.version.split()[0]}: use one of these",
    )
    spec = importlib.util.find_spec("torch")
    require(
        spec is not None,
        "needs torch >= 2.11 at build time, and none is installed: pip install torch==2.11.0, then "
        "pip install --no-build-isolation .",
    )
    version_file = Path(spec.origin).parent / "version.py"
    version = re.search(r"__version__ = '(\d+)\.(\d+)([^']*)'", version_file.read_text())
    require(
        version is not None and (int(version[1]), int(version[2])) >= TORCH_MINIMUM,
        f"needs torch >= 2.11, got {version[0] if version else 'an unreadable version'}: "
        "pip install torch==2.11.0",
    )
    check_compiler(os.environ.get("CXX", "g++"))
    require(
        Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        "needs Python's headers: apt install python3-dev (or the -dev package of this Python)",
    )


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, incrementally: the build folder is kept."""

    def build_extension(self, ext: Extension) -> None:
        """Builds the one extension module, moq._C, to where setuptools expects it."""
        check_build_environment()
        in_checkout = self.editable_mode or self.inplace
        output = ROOT / "moq" if in_checkout else Path(self.get_ext_fullpath(ext.name)).parent
        build = ROOT / "build" / (sys.implementation.cache_tag + ("" if in_checkout else "-wheel"))
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python3_EXECUTABLE": sys.executable,
            "MOQ_OUTPUT_DIRECTORY": output.resolve(),
            "MOQ_CUDA": os.environ.get("MOQ_CUDA", "auto"),
            "MOQ_CUDA_ARCHITECTURES": os.environ.get("MOQ_CUDA_ARCHITECTURES", "80;90a"),
            "MOQ_BUILD_TESTS": "ON" if os.environ.get("MOQ_BUILD_TESTS") == "1" else "OFF",
        }
        scripts = sysconfig.get_path("scripts")
        environment = os.environ | {"PATH": scripts + os.pathsep + os.environ["PATH"]}
        cmake = shutil.which("cmake", path=environment["PATH"])
        require(cmake is not None, "needs cmake >= 3.24: pip install cmake ninja")
        definitions = [f"-D{key}={value}" for key, value in options.items()]
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *definitions]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        compile_all = [cmake, "--build", str(build), "--parallel", jobs, "--target", "_C"]
        if options["MOQ_BUILD_TESTS"] == "ON":
            compile_all.append("cpp_tests")
        for command in (configure, compile_all):
            if subprocess.run(command, env=environment, check=False).returncode != 0:
                sys.exit(f"moq: the build stopped at: {' '.join(command)}")

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: an editable build writes the module into the checkout itself."""


if __name__ == "__main__":
    setup(ext_modules=[Extension("moq._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
