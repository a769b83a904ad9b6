"""The CUDA sources of csrc/ compiled by g++ for the threads of this machine, through host_cuda.h."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

from fastrl.kernels.row_once import VECTOR, Arguments, Configuration, RowKernel
from fastrl.models.row_once import CompiledRowKernel, has_clusters
from fastrl.weights import nvrtc

SUPPORT = Path(__file__).parent


def compiled_by_gcc(program: str, *options: str) -> ctypes.CDLL:
    """A program that includes host_cuda.h and a source. Skips the test where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the kernels for the CPU with")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.so"
        how = ["-O1", "-std=c++20", "-ffp-contract=off", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
        where = [f"-I{SUPPORT}", f"-I{nvrtc.source().parent}"]
        command = [compiler, *how, *options, *where, "-xc++", "-", "-o", path]
        subprocess.run(command, input=program, text=True, check=True)
        return ctypes.CDLL(str(path))


@cache
def row_once(groups: int, threads: int, blocks: int) -> ctypes.CDLL:
    """Its instances of up to two groups, or of just so many."""
    instances = product([1, 2] if groups <= 2 else [groups], [False, True], [False, True])
    program = f"""
#include "host_cuda.h"
#include "row_once.cu"
{"".join(Configuration(*each).instance for each in instances)}
extern "C" void run(void (*kernel)(Arguments), const Arguments* a, int rows) {{
  run_clusters(kernel, *a, rows, kBlocks, kThreads);
}}
"""
    return compiled_by_gcc(program, f"-DFASTRL_ROW_THREADS={threads}", f"-DFASTRL_ROW_BLOCKS={blocks}")


class HostRowKernel:
    """A `RowKernel` on the threads of a CPU; two blocks of a warp in a cluster, or as many as are asked for."""

    def __init__(self, threads: int = 32, blocks: int = 2):
        self.threads, self.blocks, self.group = threads, blocks, threads * blocks * VECTOR
        self.most_words = 1 << 20

    def launch(self, configuration: Configuration, arguments: Arguments, rows: int) -> None:
        library = row_once(max(2, configuration.groups), self.threads, self.blocks)
        library.run(library[configuration.name], ctypes.byref(arguments), rows)


def row_kernel() -> RowKernel:
    """That of the device on which tests of kernels run; where PyTorch is built for CPUs, all memory is a CPU's."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return HostRowKernel()
    if not has_clusters():
        pytest.skip("a row of logits is read once by a cluster of blocks, which needs compute capability 9.0")
    return CompiledRowKernel()
