"""Where kernels are tested: on a GPU compiled, elsewhere in Triton's interpreter, also on the pretended CUDA device."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILED = DEVICE == "cuda" and os.environ.get("TRITON_INTERPRET") != "1"  # for a GPU that is there
