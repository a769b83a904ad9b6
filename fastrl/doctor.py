"""Look over the machine and a model before a run: one screen of what is there, what is missing, and what would fail.

    python -m fastrl.doctor                                  the embedded model
    python -m fastrl.doctor --model DIR --out runs/mine --template chat

Versions, GPUs with their load, clocks and other processes, device and driver, free memory, disk and shared memory
against what a checkpoint takes, whether the grader answers, and how the tokenizer ends, pads and renders a prompt.
Loads no weights. Exit codes: 0 fine, 2 something fails.
"""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastrl.base.exits import run_program
from fastrl.base.log import say, versions
from fastrl.base.setting import check_bounds, setting
from fastrl.base.types import Problem
from fastrl.base.versions import check_versions
from fastrl.data.base import BOXED_INSTRUCTION
from fastrl.data.prompts import describe_prompt, encode_prompts
from fastrl.data.task import TaskConfig
from fastrl.data.template import template_arguments
from fastrl.models.loading import EMBEDDED, load_tokenizer, model_config, parameter_shapes, pick_device
from fastrl.models.tokens import num_ids
from fastrl.rewards import VERIFIERS, RewardSet
from fastrl.settings.parse import parse
from fastrl.watch.card import MIB, NoCard, Reading, count_cards, open_card

SHM = Path("/dev") / "shm"
SHM_LEAST = 64 * 2**20  # bytes; NCCL takes about ten MB per pair of ranks
# completions of the gold 2x with the grade they must get; the last one needs a process that can be killed
GRADED = ((r"\boxed{2x}", 1.0), (r"\boxed{3x}", 0.0), (r"\boxed{x+x}", 1.0), (r"\boxed{9^{9^{9^{9}}}}", 0.0))


@dataclass(kw_only=True)
class DoctorConfig:
    model: str = EMBEDDED  # a Hugging Face model folder or name, or `embedded`
    out: str = "runs"  # folder of the runs: where checkpoints go
    keep: int = setting(2, "[1, 1e6]")  # checkpoints that stay, as in training
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    task: TaskConfig = field(default_factory=TaskConfig)

    def __post_init__(self):
        check_bounds(self)


def gpu(config: DoctorConfig) -> list[str]:
    """What the driver says of the GPUs that `--device` may mean. Comes before anything that makes a context on one.

    Nothing here ends a run: without readings it has fewer metrics.
    """
    found = count_cards()
    one = config.device.startswith("cuda:")
    devices = [config.device] if one else [f"cuda:{i}" for i in range(found or 1)]
    lines = [line for device in devices for line in card_lines(device)]
    if found and not torch.cuda.is_available():
        lines.append(f"torch {torch.__version__} uses none of them; install its build for CUDA")
    return lines


def card_lines(device: str) -> list[str]:
    """Of one GPU: how it is now, who else is on it, and what it does not tell."""
    card = open_card(device)
    try:
        if isinstance(card, NoCard):
            raise card
        now, (used, total), held = card.read(), card.capacity(), card.held()
    except NoCard as error:
        return [f"{device} cannot be read: {error}"]
    memory = "memory unknown" if used is None or total is None else f"{used / MIB:.0f} of {total / MIB:.0f} MiB in use"
    lines = [f"{device} {card.name}, driver {card.driver}: {', '.join([memory, *state(now, card.top_sm_mhz)])}"]
    lines += [f"{device} {held}"] if held else []
    missing = [name for name in now.missing if name != "own"]  # this process has nothing there yet
    return lines + ([f"{device} does not tell: {', '.join(missing)}"] if missing else [])


def state(now: Reading, top_sm_mhz: float | None) -> list[str]:
    """Load, power and clocks, as far as a card tells them."""
    found = [f"busy {now.busy:.0%}"] if now.busy is not None else []
    found += [f"{now.watts:.0f} W"] if now.watts is not None else []
    if now.sm_mhz is not None:
        found.append(f"SM {now.sm_mhz:.0f}" + ("" if top_sm_mhz is None else f" of {top_sm_mhz:.0f}") + " MHz")
    if now.slowed is not None:
        found.append(f"clocks held down by {', '.join(now.slowed)}" if now.slowed else "nothing holds the clocks down")
    return found


def machine(config: DoctorConfig) -> list[str]:
    """Device, driver and memory."""
    device, dtype = pick_device(config.device, "auto")
    lines = [f"device {device}, weights {str(dtype).removeprefix('torch.')}, {os.cpu_count()} cores"]
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        driver = Path("/proc/driver/nvidia/version")
        said = driver.read_text().splitlines()[0] if driver.exists() else "driver unknown"
        lines.append(f"{torch.cuda.get_device_name(device)}: {gib(free)} of {gib(total)} free, {said}")
    names = {"MemTotal": 0, "MemAvailable": 0}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in names:
            names[name] = int(value.split()[0]) * 1024
    return [*lines, f"host memory {gib(names['MemAvailable'])} of {gib(names['MemTotal'])} free"]


def disk(config: DoctorConfig) -> list[str]:
    """Free space against checkpoints. Raises ValueError when the one more that is written before pruning cannot fit."""
    shm = shutil.disk_usage(SHM).free if SHM.is_dir() else 0
    if shm < SHM_LEAST:
        raise ValueError(f"{SHM} has {gib(shm)} free, expected at least {gib(SHM_LEAST)}; docker: --shm-size 1g")
    size = checkpoint_bytes(config)
    folder = next(f for f in (Path(config.out).absolute(), *Path(config.out).absolute().parents) if f.is_dir())
    free, needed = shutil.disk_usage(folder).free, size * (config.keep + 1)
    said = f"{gib(free)} free at {folder}; a checkpoint takes {gib(size)}, and {config.keep + 1} lie there at once"
    if free < needed:
        raise ValueError(f"{said}: {gib(needed)}; make room, or take --out on another disk")
    return [said, f"{SHM} {gib(shm)} free"]


def checkpoint_bytes(config: DoctorConfig) -> int:
    """Weights, and per parameter a float32 master and two float32 moments, over all ranks."""
    _, dtype = pick_device(config.device, "auto")
    shapes = parameter_shapes(model_config(config.model))
    return sum(math.prod(shape) for shape in shapes.values()) * (dtype.itemsize + 12)


def grader(config: DoctorConfig) -> list[str]:
    """Raises ValueError when grades are not what they must be."""
    texts = [text for text, _ in GRADED]
    with RewardSet(["math"], workers=1) as rewards:
        scores = rewards.score([""] * len(texts), texts, ["2x"] * len(texts))
    if scores.total != [grade for _, grade in GRADED]:
        raise ValueError(f"the grader gave {scores.total} for {texts}, expected {[grade for _, grade in GRADED]}")
    return [f"math answers, and outlives an answer without end: {scores.statuses}; there are {', '.join(VERIFIERS)}"]


def tokenizer(config: DoctorConfig) -> list[str]:
    """End, padding and a rendered prompt. Raises ValueError without an end-of-text token or a usable template."""
    opened = load_tokenizer(config.model)
    if opened.eos_token_id is None:
        raise ValueError(f"--model {config.model}: the tokenizer has no end-of-text token, so no completion would end")
    pad = "none, the end is used" if opened.pad_token_id is None else f"{opened.pad_token!r} {opened.pad_token_id}"
    problem = Problem(id="doctor", prompt="1+1=", answer="2")
    instruction = config.task.instruction if config.task.instruction != "auto" else BOXED_INSTRUCTION
    instruction = "" if config.model == EMBEDDED else instruction
    encode_prompts(
        [problem],
        opened,
        template=config.task.template,
        instruction=instruction,
        max_prompt_tokens=config.task.max_prompt_tokens,
        template_args=template_arguments(config.task.template_args),
    )
    ids = "" if num_ids(opened) == len(opened) else f" with ids to {num_ids(opened) - 1}"
    kind = "a chat template" if opened.chat_template else "no chat template"
    return [
        f"{len(opened)} tokens{ids}, end {opened.eos_token!r} {opened.eos_token_id}, padding {pad}, {kind}",
        f"a prompt, {describe_prompt(problem, opened)}",
    ]


def packages(config: DoctorConfig) -> list[str]:
    found = check_versions()
    needed = [f"{name} {have or 'not installed'} (>= {least})" for name, (have, least) in found.items()]
    others = [f"{name} {value}" for name, value in versions().items() if name not in found]
    return [", ".join(names) for names in (needed, others) if names]


CHECKS: dict[str, Callable[[DoctorConfig], list[str]]] = {
    "versions": packages,
    "gpu": gpu,
    "machine": machine,
    "disk": disk,
    "grader": grader,
    "tokenizer": tokenizer,
}


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"


def main(argv: list[str]) -> int:
    config = parse(DoctorConfig, argv, {})
    code = 0
    for name, check in CHECKS.items():
        try:
            lines = check(config)
        except (ValueError, RuntimeError, OSError) as error:
            lines, code = [f"FAILS: {error}"], 2
        for i, line in enumerate(lines):
            say(f"{name if i == 0 else '':10} {line}")
    say("fine" if code == 0 else "a run would fail")
    return code


if __name__ == "__main__":
    run_program(main)
