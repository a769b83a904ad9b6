"""Whether the Triton path of the head gives what the torch path gives, on this device, this compiler and this head."""

import torch
from torch import Tensor

from fastrl.kernels.linear_logprob import linear_logprob
from fastrl.kernels.logit_map import PLAIN, LogitMap

NUM_ROWS = 1024  # of hidden states: with the words below, more than one slab
NUM_WORDS = 20_000  # of the head: more than two blocks, and little memory
LOGPROB_NATS = 1e-3  # far above rounding (1e-5), far below anything wrong
GRADIENT_FRAC = 0.02  # of the norm; rounding to bfloat16 makes 0.004


def head_fault(weight: Tensor, logit_map: LogitMap = PLAIN) -> str:
    """weight [V, H] of the head, and what follows it -> what is wrong with the Triton path, empty if nothing."""
    weight = weight.detach()[:NUM_WORDS]
    generator = torch.Generator(device=weight.device).manual_seed(0)
    hidden = torch.randn(NUM_ROWS, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
    target = torch.randint(0, len(weight), (NUM_ROWS,), generator=generator, device=weight.device)
    upstream = torch.randn(2, NUM_ROWS, generator=generator, device=weight.device)

    def run(triton: bool) -> dict[str, Tensor]:
        leaf = hidden.clone().requires_grad_()
        gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        with torch.enable_grad():
            logprobs, entropy, _ = linear_logprob(
                leaf,
                weight,
                target,
                inv_temperature=0.8,
                logit_map=logit_map,
                need_entropy=True,
                weight_grad=gradient,
                triton=triton,
            )
            assert entropy is not None  # need_entropy
            (logprobs * upstream[0] + 0.1 * entropy * upstream[1]).sum().backward()
        assert leaf.grad is not None
        return {
            "logprobs": logprobs.detach(),
            "entropy": entropy.detach(),
            "hidden gradient": leaf.grad.float(),
            "weight gradient": gradient,
        }

    expected = run(triton=False)
    try:
        found = run(triton=True)
    except Exception as error:  # whatever a compiler or driver may say: it is told to the user, and the torch path runs
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    for name, right in expected.items():
        difference = found[name] - right
        nats = name in ("logprobs", "entropy")
        off = (difference.abs().max() if nats else difference.norm() / right.norm()).item()
        if not off <= (LOGPROB_NATS if nats else GRADIENT_FRAC):
            return f"{name} off by {off:.3g}" + (" nats" if nats else " of its norm")
    return ""
