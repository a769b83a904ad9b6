"""Which errors say that memory has run out: torch has a class for its own allocator, others say it in words."""

import torch

# of RuntimeErrors, whatever raised them: CUDA's runtime and driver, NCCL, cuBLAS, cuDNN, torch's allocator of the host
WORDS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DEVICE_ALLOCATION_FAILED",  # of cuDNN 9, in CUDNN_STATUS_INTERNAL_ERROR_...
    "HOST_ALLOCATION_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


def means_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller piece of the same work may succeed. Triton's "out of resource" is no such error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
