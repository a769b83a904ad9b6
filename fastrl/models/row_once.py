"""csrc/row_once.cu on a GPU: compiled by NVRTC when a configuration is first needed, launched by the driver."""

import ctypes
from functools import cache
from typing import Any

import torch

from fastrl.kernels.row_once import BLOCKS, THREADS, VECTOR, Arguments, Configuration
from fastrl.weights import nvrtc

MOST_GROUPS = 16  # 128 registers of a thread
CLUSTERS = (9, 0)  # the first compute capability that has them


def has_clusters() -> bool:
    """Of the current CUDA device."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability() >= CLUSTERS


class CompiledRowKernel:
    """The `RowKernel` of the current device; a compilation takes a second or two, once a configuration and process.

    Raises ValueError on a device without clusters, RuntimeError with what the compiler or the driver says.
    """

    group = THREADS * BLOCKS * VECTOR
    most_words = MOST_GROUPS * group

    def __init__(self):
        if not has_clusters():
            name, found = torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))
            raise ValueError(f"row_kernel: {name} is of compute capability {found}, expected 9.0; leave row_kernel out")

    def launch(self, configuration: Configuration, arguments: Arguments, rows: int) -> None:
        function = kernel(torch.cuda.current_device(), configuration)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream, launch = torch.cuda.current_stream().cuda_stream, nvrtc.bindings("driver").cuLaunchKernel
        grid, block = (rows * BLOCKS, 1, 1), (THREADS, 1, 1)
        nvrtc.ask(launch, function, *grid, *block, 0, stream, ctypes.addressof(parameters), 0)


@cache
def kernel(device: int, configuration: Configuration) -> Any:
    """It stays as long as the process."""
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    module = nvrtc.loaded(cubin(configuration, arch))
    return nvrtc.ask(nvrtc.bindings("driver").cuModuleGetFunction, module, configuration.name.encode())


def cubin(configuration: Configuration, arch: str) -> bytes:
    path = nvrtc.source().with_name("row_once.cu")
    return nvrtc.compiled(path.read_text() + configuration.instance, arch, folder=path.parent, name=path.name)
