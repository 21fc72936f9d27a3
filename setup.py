"""Compiles the CPU kernels into the wheel where there is a compiler; everything else is in pyproject.toml.

The wheel is then for this system and machine, and for any Python 3; without a compiler it is for all of them, and the
kernels are compiled at first use. An editable install is of the second kind.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = "kernels/cpu"


class WithKernels(Distribution):
    """Knows whether the build has compiled anything."""

    compiled_kernels = False

    def has_ext_modules(self) -> bool:
        """Where the package is installed, and what its wheel is called, hang on this."""
        return self.compiled_kernels or super().has_ext_modules()


class BuildWithKernels(build_py):
    """Puts the library beside the modules."""

    def run(self) -> None:
        """Goes on without the library where it cannot be compiled: it is faster, but nothing needs it."""
        super().run()
        if self.editable_mode:
            return
        build = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / KERNELS / "build.py")))
        compiler = build.find_compiler()
        if compiler is None:
            self.warn("no C++ compiler: the CPU kernels are left to be compiled at first use")
            return
        folder = Path(self.build_lib, "edgekv", KERNELS, "prebuilt")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            build.build(folder / build.library_name(), compiler)
        except build.BuildFailed as error:
            self.warn(f"the CPU kernels are left to be compiled at first use: {error}")
        else:
            self.distribution.compiled_kernels = True


class WheelWithKernels(bdist_wheel):
    """Tagged by what was built: it is the kernels that are of a system and machine, and no Python in particular."""

    def run(self) -> None:
        """Build first, so that what it found is known."""
        if not self.skip_build:
            self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """As py3-none-linux_x86_64, or py3-none-any."""
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(distclass=WithKernels, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels})
