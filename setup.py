"""Builds the CPU kernel into the wheel where a compiler is there; everything else: pyproject.toml.

Without a compiler the wheel is pure Python, and the kernel is built on first use or not at all.
"""

import importlib.util
import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNEL = Path("triton_kernels") / "dialect_kernels" / "cpu" / "build.py"


class BuildWithKernel(build_py):
    """Compile the kernel beside its Python module, except for an editable install."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "dialect_kernels" / "cpu"
        for left in folder.glob("dialect_cpu-*.so"):  # by an earlier build in this folder
            left.unlink()
        if platform.system() != "Linux":
            return
        spec = importlib.util.spec_from_file_location("build_cpu_kernel", KERNEL)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        try:
            library = module.build(folder)
        except (module.CompilerError, OSError) as error:
            print(f"the CPU kernel is left out: {error}", file=sys.stderr)
            return
        self.distribution.kernel_library = library


class PlatformWheel(bdist_wheel):
    """A wheel with the kernel fits one platform, but any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        if getattr(self.distribution, "kernel_library", None) is None:
            return super().get_tag()
        return "py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_")


setup(cmdclass={"build_py": BuildWithKernel, "bdist_wheel": PlatformWheel})
