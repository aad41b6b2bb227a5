"""Builds the CPU kernel, a plain C library that ctypes loads; the rest of the metadata is in pyproject.toml.

Without a working C compiler the installation goes on, and the layers run through torch.
"""

from glob import glob

from setuptools import Extension, setup

# Python's own flags have -fwrapv, with which GCC keeps fewer numbers in registers. Exceptions of torch go through
# native/torch.c. Eight rows took a fifth longer where a loop began at another place within 64 bytes
# (docs/log/kernels.md).
FLAGS = ["-std=gnu11", "-O3", "-g0", "-Wno-psabi", "-fno-wrapv", "-fexceptions", "-falign-loops=64"]

setup(
    ext_modules=[
        Extension(
            "armor.runtime._native",
            sources=sorted(glob("armor/runtime/native/*.c")),
            depends=sorted(glob("armor/runtime/native/*.h")),
            extra_compile_args=FLAGS,
            optional=True,
        )
    ]
)
