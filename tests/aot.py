"""Compile every Triton kernel, as it is launched, for sm_90, without a GPU; print what came out as one JSON object.

TRITON_INTERPRET=0 python tests/aot.py        {configuration: {registers, ...}}
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrl.kernels import apo_loss, flat_update, policy_loss, rows

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
VECTOR = "*fp32"


def configurations():
    """name -> (kernel, types of its arguments by name, constants, warps); a pointer that is None is a constant."""
    loss = dict.fromkeys(("logprobs_ptr", "advantage_ptr", "w_ptr", "coef_ptr", "partials_ptr"), VECTOR)
    loss |= dict.fromkeys(("kl_coef", "low_edge", "high_edge", "dual_clip", "cap", "kl_cap"), "fp32") | {"N": "i32"}
    for mode in ("clip", "cispo", "pg"):
        for old, ref in ((True, False), (True, True), (False, False)):
            given = {"old_ptr": VECTOR} if old else {}
            given |= {"ref_ptr": VECTOR} if ref else {}
            constants = dict(
                CLIP=mode == "clip", CISPO=mode == "cispo", HAS_OLD=old, HAS_REF=ref, K1=False, K3=True,
                K3_GRADIENT=True, NUM_STATS=len(policy_loss.STATS), BLOCK_N=policy_loss.BLOCK_N,
            )  # fmt: skip
            name = "-".join(["policy_loss", mode, *(["old"] if old else []), *(["ref"] if ref else [])])
            yield name, (policy_loss.policy_loss_kernel, loss | given, constants, 4)
    vectors = ("logprobs_ptr", "ref_ptr", "value_ptr", "reward_ptr", "w_ptr", "loss_ptr", "coef_ptr", "u_ptr")
    apo = dict.fromkeys(vectors, VECTOR) | {"cu_seqlens_ptr": "*i32", "beta2": "fp32"}
    yield "apo_loss", (apo_loss.apo_loss_kernel, apo, dict(BLOCK_N=apo_loss.BLOCK_N), 4)
    forward = dict.fromkeys(("z_ptr", "logprob_ptr", "lse_ptr"), VECTOR)
    forward |= {"target_ptr": "*i64", "z_stride_n": "i32", "V": "i32", "inv_temperature": "fp32"}
    for entropy in (False, True):
        given = forward | ({"entropy_ptr": VECTOR} if entropy else {})
        constants = dict(ENTROPY=entropy, PER_TOKEN=False, BLOCK_V=rows.BLOCK_V)
        for dtype in ("fp32", "bf16"):
            name = f"row_forward-{dtype}" + "-entropy" * entropy
            yield name, (rows.row_forward_kernel, given | {"z_ptr": f"*{dtype}"}, constants, rows.NUM_WARPS)
    gradient = dict.fromkeys(("z_ptr", "lse_ptr", "dlogprob_ptr"), VECTOR)
    gradient |= {"target_ptr": "*i64", "z_stride_n": "i32", "dz_stride_n": "i32", "V": "i32", "inv_temperature": "fp32"}
    for entropy in (False, True):
        given = gradient | (dict.fromkeys(("entropy_ptr", "dentropy_ptr"), VECTOR) if entropy else {})
        constants = dict(HAS_DLSE=False, HAS_DENTROPY=entropy, PER_TOKEN=False, BLOCK_V=rows.BLOCK_V)
        for dtype in ("fp32", "bf16"):
            name = f"row_gradient-{dtype}" + "-entropy" * entropy
            yield name, (rows.row_gradient_kernel, given | {"dz_ptr": f"*{dtype}"}, constants, rows.NUM_WARPS)
    flat = dict.fromkeys(("theta_ptr", "anchor_ptr", "partials_ptr"), VECTOR) | {"n": "i64", "lookahead": "i32"}
    numbers = ("alpha", "lr", "weight_decay", "ratio_min", "ratio_max", "scale_max")
    flat |= dict.fromkeys(numbers, "fp32") | {"out_bf16_ptr": "*bf16"}
    for name, pointers in (("interpolate", ()), ("gradients", ("x0_ptr", "x1_ptr")), ("displacements", ("x0_ptr",))):
        given = flat | dict.fromkeys(pointers, VECTOR)
        limits = bool(pointers)
        given |= {"threshold_ptr": VECTOR, "segment_ptr": "*i32"} if limits else {}
        constants = dict(
            EXTRAPOLATE=bool(pointers), GRADIENTS=len(pointers) == 2, HAS_BF16=True, HAS_THRESHOLD=limits,
            NUM_STATS=flat_update.NUM_STATS, BLOCK=flat_update.BLOCK,
        )  # fmt: skip
        yield f"flat_update-{name}", (flat_update.flat_update_kernel, given, constants, 4)


def compiled(kernel, types, constants, warps) -> dict[str, int]:
    constants = constants | {name: None for name in kernel.arg_names if name not in types and name not in constants}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    # what a launch finds out by itself: pointers, strides and the vocabulary of real models are multiples of 16
    attrs = {
        (at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in ("z_stride_n", "dz_stride_n", "V", "N", "n")
    }  # fmt: skip
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    made = triton.compile(source, target=TARGET, options=dict(num_warps=warps, enable_fp_fusion=True))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    ptx = made.asm["ptx"]
    return {
        "registers": int(numbers["REG"]), "spilled_bytes": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "shared_bytes": made.metadata.shared,
        "loads_128": len(re.findall(r"ld\.global\.v4\.b32|ld\.global\.v2\.b64", ptx)),
        "stores_128": len(re.findall(r"st\.global\.v4\.b32|st\.global\.v2\.b64", ptx)),
        "f64": len(re.findall(r"\.f64", ptx)), "barrier": int("bar.sync" in ptx),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps({name: compiled(*made) for name, made in configurations()}, indent=1))
