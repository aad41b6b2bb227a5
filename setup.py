"""Builds the CPU kernel, a plain C library that ctypes loads; the rest of the metadata is in pyproject.toml.

Without a working C compiler the installation goes on, and the layers run through torch.
"""

from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Python's own flags have -fwrapv, with which GCC keeps fewer numbers in registers. Exceptions of torch go through
# native/torch.c. Eight rows took a fifth longer where a loop began at another place within 64 bytes
# (docs/TRIED.md).
FLAGS = ["-std=gnu11", "-O3", "-g0", "-Wno-psabi", "-fno-wrapv", "-fexceptions", "-falign-loops=64"]


class ParallelBuild(build_ext):
    """Compiles the sources of an extension on all cores: setuptools compiles one after the other, for half a minute."""

    def build_extension(self, ext):
        compile_all = self.compiler.compile

        def compile_each(sources, **options):
            with ThreadPoolExecutor() as pool:
                objects = pool.map(lambda source: compile_all([source], **options), sources)
                return [name for names in objects for name in names]

        self.compiler.compile = compile_each
        super().build_extension(ext)


setup(
    cmdclass={"build_ext": ParallelBuild},
    ext_modules=[
        Extension(
            "armor.runtime._native",
            sources=sorted(glob("armor/runtime/native/*.c")),
            depends=sorted(glob("armor/runtime/native/*.h")),
            extra_compile_args=FLAGS,
            optional=True,
        )
    ],
)
