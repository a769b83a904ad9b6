"""Messages that libraries give when memory runs out, as they were seen, and messages that only look like them."""

import pytest
import torch

from fastrl.base import ranks
from fastrl.base.exhausted import means_out_of_memory
from fastrl.base.types import EngineError

RAN_OUT = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 10.01 GiB. GPU 0 has a total capacity of"),
    "older torch": RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 31.75 GiB total capacity;"),
    "runtime": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "nccl": RuntimeError(
        "NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1331, unhandled cuda error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.21.5\nncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\nCuda failure 2 'out of memory'"
    ),
    "triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "host": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 132426121216 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "host, elsewhere": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to allocate "
        "31850496000 bytes."
    ),
    "python": MemoryError("Unable to allocate 8.00 GiB for an array"),
}


class OutOfResources(Exception):
    """As Triton's: registers or shared memory of a kernel, which no smaller batch changes."""


OTHERS = {
    "triton": OutOfResources("out of resource: shared memory, Required: 131072, Hardware limit: 101376."),
    "memory access": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
    "nccl": RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 'invalid argument'"),
    "gloo": RuntimeError("[/builds/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:9"),
    "settings": ValueError("the model is out of memory's reach"),
}


@pytest.mark.parametrize("name", RAN_OUT)
def test_what_means_that_memory_has_run_out(name):
    assert means_out_of_memory(RAN_OUT[name])


@pytest.mark.parametrize("name", OTHERS)
def test_what_means_something_else(name):
    assert not means_out_of_memory(OTHERS[name])


def test_what_torch_says_itself():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert type(caught.value) is RuntimeError and means_out_of_memory(caught.value)


def test_a_collective_that_has_no_memory_is_no_lost_rank(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match="out of memory"), ranks.reaching_others():
        raise RAN_OUT["nccl"]
    with pytest.raises(EngineError, match="invalid argument"), ranks.reaching_others():
        raise OTHERS["nccl"]
