"""The one thing that pyproject.toml cannot say: the C++ kernels, built where a compiler is, left out where none is."""

from setuptools import Extension, setup

FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-pthread"]
# A fused multiply-add rounds once where the specification rounds twice.
FLAGS += ["-ffp-contract=off"]

setup(
    ext_modules=[
        Extension(
            "peer.core.kernels._native",
            sources=["peer/core/kernels/kernels.cpp"],
            language="c++",
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            # Without a compiler the installation goes on, and the programs say that they run on numpy.
            optional=True,
        )
    ]
)
