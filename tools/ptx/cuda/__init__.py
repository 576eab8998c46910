"""Runs the CUDA library's host code and kernels, as nvcc compiles them, without a GPU.

:mod:`.build` compiles csrc/cuda and CUB with nvcc and links them with a stand-in for CUDA's runtime (runtime.cpp). This
hands each launch to :mod:`.driver`, which runs the kernel's PTX on the interpreter. :mod:`.plugin` does so for pytest.
"""
