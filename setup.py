"""Compile the CPU kernel into the wheel if there is a compiler; pyproject.toml holds the rest.

Without a compiler the wheel is pure Python; the first use then compiles the kernel, if it can.
"""

import importlib.util
import platform
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

COMPILE = Path("triton_kernels") / "dialect_kernels" / "cpu" / "build.py"


def load_by_path(path: Path) -> ModuleType:
    """Import one module of the package, without the package and what it needs."""
    spec = importlib.util.spec_from_file_location(f"setup_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildWithKernel(build_py):
    """Compile the kernel beside its Python module, except for an editable install."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "dialect_kernels" / "cpu"
        for stale in folder.glob("dialect_cpu-*.so"):  # from an earlier build in this folder
            stale.unlink()
        if platform.system() != "Linux":
            return
        compiler = load_by_path(COMPILE)
        try:
            self.distribution.kernel_library = compiler.build(folder)
        except (compiler.CompilerError, OSError) as error:
            print(f"the wheel has no CPU kernel: {error}", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """A wheel with the kernel fits one platform, but any version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        if getattr(self.distribution, "kernel_library", None) is None:
            return super().get_tag()
        return "py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_")


setup(cmdclass={"build_py": BuildWithKernel, "bdist_wheel": PlatformWheel})
