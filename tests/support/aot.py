"""Compile every kernel, as it is launched, for sm_90, without a GPU; print what came out as one JSON object.

TRITON_INTERPRET=0 python tests/support/aot.py [--golden] [NAME ...]    {name: {registers, ...}}

NAME: only kernels whose names begin so. --golden: write them into tests/golden/kernels_sm90.json, which names the
version of Triton; what nvcc makes stays there where there is none.

Triton's kernels are compiled by Triton, those of csrc/ by nvcc where there is one.
"""

import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastrl.kernels import flat_update, row_once, rows, split_adamw, vectors

TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
GOLDEN = Path(__file__).parents[1] / "golden" / "kernels_sm90.json"
CSRC = Path(__file__).parents[2] / "csrc"
VECTOR = "*fp32"
# a launch tells sizes apart: multiples of 16, with which 16 bytes move at a time, 1, which is a constant, and the rest
ODD, ONE = "odd", "one"
REGISTERS = 65536  # of a multiprocessor


def suffix(size: str, usual: str) -> str:
    return "" if size == usual else f"-{size}"


def policy_loss():
    types = dict.fromkeys(("logprobs_ptr", "advantage_ptr", "w_ptr", "coef_ptr", "partials_ptr"), VECTOR)
    types |= dict.fromkeys(("kl_coef", "low_edge", "high_edge", "dual_clip", "cap", "kl_cap"), "fp32") | {"N": "i32"}
    estimators = {
        "k1": (True, False, False),
        "k2": (False, False, False),
        "k3": (False, True, True),
        "k3+": (False, True, False),
    }
    for mode in ("clip", "cispo"):
        for old, ref in ((False, ""), (True, ""), *((True, k) for k in (estimators if mode == "clip" else ("k3",)))):
            given = ({"old_ptr": VECTOR} if old else {}) | ({"ref_ptr": VECTOR} if ref else {})
            k1, k3, k3_gradient = estimators[ref or "k3"]
            constants = dict(
                CISPO=mode == "cispo",
                HAS_OLD=old,
                HAS_REF=bool(ref),
                K1=k1,
                K3=k3,
                K3_GRADIENT=k3_gradient,
                NUM_STATS=vectors.NUM_STATS,
                BLOCK_N=vectors.BLOCK_N,
            )
            name = "-".join(["policy_loss", mode, *(["old"] if old else []), *([ref] if ref else [])])
            for size in ("i32", ODD, ONE) if old else ("i32",):
                sized = types | given | {"N": size}
                yield name + suffix(size, "i32"), (vectors.policy_loss_kernel, sized, constants, 4)


def apo_loss():
    pointers = ("logprobs_ptr", "ref_ptr", "target_ptr", "loss_ptr", "residual_ptr", "u_ptr", "coef_ptr")
    types = dict.fromkeys(pointers, VECTOR) | {"mask_ptr": "*u8", "beta2": "fp32"}
    for size in ("i32", ODD, ONE):
        sized = types | {"S": size}
        yield "apo_loss" + suffix(size, "i32"), (vectors.apo_loss_kernel, sized, dict(BLOCK_N=vectors.BLOCK_N), 4)


def row_parts():
    """(name, whether it resumes, whether it finishes, V, the block): a whole row or a slab of one."""
    small, large = rows.SLAB_WORDS, rows.BLOCK_V
    yield "", False, True, "i32", large
    yield "-slab", True, False, "i32", small
    yield "-first", False, False, "i32", small
    yield "-last", True, True, "i32", small
    # these for the plain kernel alone
    for block in (small, 2 * small, 4 * small):
        yield f"-{block}", False, True, "i32", block  # a vocabulary of at most so many words
    yield f"-{small}", False, True, ONE, small
    yield "", False, True, ODD, large
    for name, resume, finish in (("-first", False, False), ("-slab", True, False), ("-last", True, True)):
        yield f"{name}-{large}", resume, finish, "i32", large  # few rows, so slabs are wide
    yield "-last", True, True, ODD, small
    yield f"-last-{large}", True, True, ODD, large
    yield "-last", True, True, ONE, small


def row_forward():
    types = dict.fromkeys(("z_ptr", "logprob_ptr", "lse_ptr", "state_ptr"), VECTOR)
    types |= dict.fromkeys(("z_stride_n", "first_word"), "i32") | {"target_ptr": "*i64"}
    types |= {"inv_temperature": "fp32", "inner": "fp32"}
    for entropy, (per_token, cap) in itertools.product((False, True), ((0, 0), (1, 0), (0, 1))):
        given = ({"entropy_ptr": VECTOR} if entropy else {}) | ({"inv_temperature_ptr": VECTOR} if per_token else {})
        parts = itertools.islice(row_parts(), 4 if per_token or cap else None)
        for part, resume, finish, size, block in parts:
            constants = dict(SOFTCAP=bool(cap), ENTROPY=entropy, PER_TOKEN=bool(per_token))
            constants |= dict(RESUME=resume, FINISH=finish, BLOCK_V=block)
            name = "row_forward-fp32" + part + suffix(size, "i32") + "-per_token" * per_token + "-softcap" * cap
            name += "-entropy" * entropy
            warps = block * rows.NUM_WARPS // rows.BLOCK_V
            yield name, (rows.row_forward_kernel, types | given | {"V": size}, constants, warps)


def row_gradient():
    types = dict.fromkeys(("z_ptr", "lse_ptr", "dlogprob_ptr"), VECTOR) | {"target_ptr": "*i64"}
    types |= dict.fromkeys(("z_stride_n", "dz_stride_n"), "i32") | {"inv_temperature": "fp32", "inner": "fp32"}
    kinds = [("fp32", 0, 0), ("bf16", 0, 0), ("bf16", 1, 0), ("fp32", 0, 1), ("bf16", 0, 1)]
    wanted = [(*kind, size, dlse, dlse) for kind in kinds for size in ("i32", ODD) for dlse in (False, True)]
    wanted += [(dz, 0, 0, "i32", dlse, not dlse) for dz in ("fp32", "bf16") for dlse in (False, True)]
    wanted += [(dz, 0, 0, ONE, False, False) for dz in ("fp32", "bf16")]
    for dz, per_token, cap, size, dlse, dentropy in wanted:
        given = {"dz_ptr": f"*{dz}", "V": size} | ({"inv_temperature_ptr": VECTOR} if per_token else {})
        given |= {"dlse_ptr": VECTOR} if dlse else {}
        given |= dict.fromkeys(("entropy_ptr", "dentropy_ptr"), VECTOR) if dentropy else {}
        constants = dict(SOFTCAP=bool(cap), HAS_DLSE=dlse, HAS_DENTROPY=dentropy)
        constants |= dict(PER_TOKEN=bool(per_token), BLOCK_V=rows.BLOCK_V)
        asked = {(False, False): "", (True, True): "-entropy", (True, False): "-dlse", (False, True): "-dentropy"}
        name = f"row_gradient-fp32-{dz}" + suffix(size, "i32") + "-per_token" * per_token + "-softcap" * cap
        yield name + asked[dlse, dentropy], (rows.row_gradient_kernel, types | given, constants, rows.NUM_WARPS)


def flat():
    types = dict.fromkeys(("theta_ptr", "anchor_ptr", "partials_ptr"), VECTOR) | {"lookahead": ODD}
    numbers = ("alpha", "lr", "weight_decay", "ratio_min", "ratio_max", "scale_max")
    types |= dict.fromkeys(numbers, "fp32")
    # halves; a bfloat16 copy; limits by tensor; elements: int64 from 2^31 on
    kinds = [(False, True, True, "i64"), (True, False, True, "i64"), (False, True, True, "i32")]
    kinds += [(False, False, False, size) for size in ("i32", ODD, ONE)] + [(True, False, False, ODD)]
    modes = (("interpolate", ()), ("gradients", ("x0_ptr", "x1_ptr")), ("displacements", ("x0_ptr",)))
    for (name, pointers), (halves, bf16, limits, size) in itertools.product(modes, kinds):
        given = types | dict.fromkeys(pointers, VECTOR) | {"n": size}
        limited = limits and bool(pointers)
        given |= {"threshold_ptr": VECTOR, "segment_ptr": "*i32"} if limited else {}
        given |= dict.fromkeys(("theta_ptr", "low_ptr"), "*i16") if halves else {}
        given |= {"out_bf16_ptr": "*bf16"} if bf16 else {}
        constants = dict(
            EXTRAPOLATE=bool(pointers),
            GRADIENTS=len(pointers) == 2,
            HAS_LOW=halves,
            HAS_BF16=bf16,
            HAS_THRESHOLD=limited,
            NUM_STATS=flat_update.NUM_STATS,
            BLOCK=flat_update.BLOCK,
        )
        name = f"flat_update-{name}" + "-split" * halves + "-plain" * (not limits) + suffix(size, "i64")
        yield name, (flat_update.flat_update_kernel, given, constants, 4)


def adamw():
    types = dict.fromkeys(("high_ptr", "low_ptr"), "*i16") | dict.fromkeys(("first_ptr", "second_ptr"), VECTOR)
    numbers = ("divisor", "kept", "weight_1", "beta_2", "weight_2", "step_size", "root_2", "eps")
    types |= {"n": "i64"} | dict.fromkeys(numbers, "fp32")
    for grad, clipped in (("fp32", False), ("fp32", True), ("bf16", False)):
        constants = dict(CLIPPED=clipped, BLOCK=split_adamw.BLOCK)
        name = f"split_adamw-{grad}" + "-clipped" * clipped
        yield name, (split_adamw.split_adamw_kernel, types | {"grad_ptr": f"*{grad}"}, constants, 4)


def compiled_by_triton(kernel, types, constants, warps) -> dict[str, int]:
    """A pointer that is not among the types is None, and a constant."""
    constants = constants | {name: None for name in kernel.arg_names if name not in types and name not in constants}
    constants |= {name: 1 for name, kind in types.items() if kind == ONE}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    # what a launch finds out by itself: pointers and strides are multiples of 16
    attrs = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or signature[name] in ("i32", "i64")
    }
    signature = {name: "i32" if kind == ODD else kind for name, kind in signature.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    made = triton.compile(source, target=TARGET, options=dict(num_warps=warps, enable_fp_fusion=True))
    (used,) = usage(made.asm["cubin"]).values()
    return used | accesses(made.asm["ptx"]) | occupancy(used["registers"], 32 * warps)


def cuda_sources() -> dict[str, tuple[str, int]]:
    """Of csrc/, by name: the text, and the threads of a block."""
    # groups of 16,384 words: the vocabularies of Llama 3, Qwen and Gemma, and Qwen's in float32
    kinds = [(groups, softcap, True) for groups in (8, 10, 16) for softcap in (False, True)]
    kinds += [(10, softcap, False) for softcap in (False, True)]
    instances = "".join(row_once.Configuration(*kind).instance for kind in kinds)
    texts = {name: (CSRC / f"{name}.cu").read_text() for name in ("flat_update", "row_once")}
    return {"flat_update": (texts["flat_update"], 512), "row_once": (texts["row_once"] + instances, row_once.THREADS)}


def compiled_by_nvcc() -> dict[str, dict[str, int]]:
    """The kernels of csrc/ by name; nothing without an nvcc."""
    found = {}
    for name, (text, threads) in cuda_sources().items() if shutil.which("nvcc") else ():
        cubin, ptx = made_by_nvcc(name, text)
        for kernel, used in usage(cubin).items():
            found[kernel] = used | accesses(ptx[kernel]) | occupancy(used["registers"], threads)
            found[kernel].pop("f64")  # statistics are summed in it; tests/kernels/test_flat_update.py looks at where
    return found


def made_by_nvcc(name: str, text: str) -> tuple[bytes, dict[str, str]]:
    """A source -> its cubin, and the PTX of its kernels by name."""
    with tempfile.TemporaryDirectory() as folder:
        made, source = {}, Path(folder) / f"{name}.cu"
        source.write_text(text)
        for kind in ("cubin", "ptx"):
            path = Path(folder) / f"{name}.{kind}"
            how = ["-O3", "-std=c++17", f"-{kind}", "-arch=sm_90", f"-I{CSRC}"]
            subprocess.run(["nvcc", *how, "-o", path, source], check=True)
            made[kind] = path.read_bytes()
    entries = re.split(r"\.visible \.entry ", made["ptx"].decode())[1:]
    return made["cubin"], {entry.partition("(")[0]: entry for entry in entries}


def usage(cubin: bytes) -> dict[str, dict[str, int]]:
    """Registers, spills and shared memory by kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {}
    for name, line in re.findall(r"Function (\w+):\s*\n\s*(.*)", said):
        numbers = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line))
        spilled = int(numbers["STACK"]) + int(numbers["LOCAL"])
        found[name] = {
            "registers": int(numbers["REG"]),
            "spilled_bytes": spilled,
            "shared_bytes": int(numbers["SHARED"]),
        }
    return found


def accesses(ptx: str) -> dict[str, int]:
    wide = r"\.global[.\w:]*\.(?:v4\.[bfu]32|v2\.[bfu]64)"
    return {
        "loads_128": len(re.findall(r"\bld" + wide, ptx)),
        "stores_128": len(re.findall(r"\bst" + wide, ptx)),
        "f64": len(re.findall(r"\.f64", ptx)),
        "barrier": int("bar.sync" in ptx),
    }


def occupancy(registers: int, threads: int) -> dict[str, int]:
    """Programs of a multiprocessor at a time, as far as registers and threads go; registers come in eights."""
    return {"programs": min(2048 // threads, REGISTERS // (-(-registers // 8) * 8 * threads))}


# a generator of (name, (kernel, types of its arguments, constants, warps)) for each family of kernels
FAMILIES = [policy_loss, apo_loss, row_forward, row_gradient, flat, adamw]


def everything(*names: str) -> dict[str, dict[str, int]]:
    """All kernels, or those whose names begin with one of `names`."""
    made = [pair for family in FAMILIES for pair in family()]
    assert len(dict(made)) == len(made), "two configurations of one name"
    wanted = [(name, given) for name, given in made if name.startswith(names or "")]
    return {name: compiled_by_triton(*given) for name, given in wanted} | ({} if names else compiled_by_nvcc())


if __name__ == "__main__":
    names = [word for word in sys.argv[1:] if word != "--golden"]
    found = everything(*names)
    if "--golden" in sys.argv:
        golden = json.loads(GOLDEN.read_text())["kernels"]
        kept = {name: used for name, used in golden.items() if names or name.startswith("fastrl_")}
        text = json.dumps({"triton": triton.__version__, "kernels": kept | found}, indent=1)
        text = re.sub(r"\{\s+(\"registers\"[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text)
        GOLDEN.write_text(text + "\n")
    print(json.dumps({"triton": triton.__version__, "kernels": found}, indent=1))
