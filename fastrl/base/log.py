"""What a person and a script see of a run: one console line per step, metrics.jsonl, status.json, curve.png."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

LOGGERS = ("tensorboard", "wandb")
# control characters but newline and tab, and what turns the direction of the text around it
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Model output for a terminal: control characters, escape sequences among them, become visible."""
    text = CONTROL.sub(lambda m: m.group().encode("unicode_escape").decode(), text)
    return text.encode("utf-8", "backslashreplace").decode()


def say(text: str) -> None:
    """Everything that a program prints goes through here."""
    print(printable(text), flush=True)


def write_json(path: Path, value: object) -> None:
    """Replace a file in one step, so that a reader never sees half of it; of several writers the last one wins."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # ranks that hang together say so together
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


class RunLog:
    """Files of one run folder. On other ranks than 0 nothing is written.

    metrics.jsonl holds one object per step, numbers as Python writes them (a NaN step is NaN), and one per evaluation.
    """

    def __init__(self, folder: Path, *, total_steps: int, quiet: bool = False):
        self.folder, self.total_steps, self.quiet = folder, total_steps, quiet
        self.path = folder / "metrics.jsonl"
        self.previous_reward = math.nan
        self.writers: list[tuple] = []
        self.ended = False  # whether the last word is written

    def open(self, loggers: tuple[str, ...] = ()) -> None:
        """Make the folder and start the optional loggers; before this nothing is written but what `say` prints."""
        if not self.quiet:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.writers = [open_logger(name, self.folder) for name in loggers]

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed run writes it again."""
        if self.quiet or not self.path.exists():
            return
        rows = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] <= step]
        self.path.write_text("".join(row + "\n" for row in rows))
        rewards = [json.loads(row).get("reward") for row in rows]
        self.previous_reward = next((r for r in reversed(rewards) if r is not None), math.nan)

    def last(self, name: str) -> float:
        """The newest value of a metric that is written down; 0 without one."""
        if self.quiet or not self.path.exists():
            return 0.0
        rows = [json.loads(line) for line in self.path.read_text().splitlines()]
        return next((row[name] for row in reversed(rows) if name in row), 0.0)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one object to metrics.jsonl and hand it to the optional loggers."""
        if self.quiet:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for write, _ in self.writers:
            write(step, values)

    def close(self) -> None:
        """Let the optional loggers finish."""
        for _, close in self.writers:
            close()

    def step(self, step: int, values: dict[str, float], eta_s: float) -> None:
        """The metrics of a training step, and its console line."""
        self.metrics(step, values)
        delta = values["reward"] - self.previous_reward
        self.previous_reward = values["reward"]
        width = len(str(self.total_steps))
        change = f" ({delta:+.2f})" if math.isfinite(delta) else " (     )"
        parts = [
            f"step {step:{width}}/{self.total_steps}",
            f"reward {values['reward']:.2f}{change}",
            f"signal {1 - values['frac_reward_zero_std']:.2f}",
            f"len {values['completions/mean_length']:.1f}",
            f"entropy {values['entropy']:.3f}",
            f"grad {values['grad_norm']:.2f}",
            *([f"kl {values['kl']:.4f}"] if "kl" in values else []),
            *([f"SKIPPED {values['skipped']:.0f}"] if values["skipped"] else []),
            f"{values['perf/tokens_per_s']:.0f} tok/s",
            f"{values['step_time']:.2f} s (rollout {values['timing_s/rollout']:.2f}"
            f" update {values['timing_s/update']:.2f})",
            f"eta {int(eta_s) // 60}:{int(eta_s) % 60:02}",
        ]
        self.say("  ".join(parts))

    def say(self, text: str) -> None:
        if not self.quiet:
            say(text)

    def rollouts(self, step: int, groups: Iterable[list[dict]]) -> None:
        """rollouts/step_NNNNNN.jsonl, one object per completion. groups: taken one by one, by all ranks to the end."""
        folder = self.folder / "rollouts"
        if not self.quiet:
            folder.mkdir(exist_ok=True)
        with open(os.devnull if self.quiet else folder / f"step_{step:06}.jsonl", "w") as file:
            for rows in groups:
                file.write("" if self.quiet else "".join(json.dumps(row) + "\n" for row in rows))

    def status(
        self,
        reason: str,
        step: int,
        last_checkpoint: str | None,
        code: int | None,
        message: str = "",
        phase: str = "",
        *,
        last_word: bool = False,
    ) -> None:
        """status.json: how the run ended, for whoever cannot see the exit code; "running", without a code, until then.

        last_word: on whatever rank, and nothing that this process says later replaces it.
        """
        if self.ended or (self.quiet and not last_word):
            return
        self.ended = last_word
        self.folder.mkdir(parents=True, exist_ok=True)
        values = {"reason": reason, "step": step, "last_checkpoint": last_checkpoint, "exit_code": code}
        write_json(self.folder / "status.json", {**values, "phase": phase, "message": message})

    def curve(self) -> Path | None:
        """Draw reward and evaluation against rollouts into curve.png."""
        if self.quiet:  # another rank is writing the file
            return None
        rows = [json.loads(line) for line in self.path.read_text().splitlines()]
        steps = [row for row in rows if "reward" in row]
        if not steps:
            return None
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        axes.plot([r["num_rollouts"] for r in steps], [r["reward"] for r in steps], lw=1, label="training reward")
        names = sorted({k for r in rows for k in r if re.fullmatch(r"eval/.+/avg@\d+", k)})
        for name in names:
            points = [(r.get("num_rollouts", 0), r[name]) for r in rows if name in r]
            axes.plot(*zip(*points, strict=True), "o-", lw=2, label=name)
        axes.set(xlabel="rollouts", ylabel="mean reward")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.folder / "curve.png", dpi=120)
        pyplot.close(figure)
        return self.folder / "curve.png"


def check_logger(name: str) -> None:
    """Raise ValueError unless the package of 'tensorboard' | 'wandb' can be imported."""
    modules = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
    if name not in modules:
        raise ValueError(f"--log {name}: there is {' and '.join(LOGGERS)}; metrics.jsonl is always written")
    try:
        importlib.import_module(modules[name])
    except ImportError as error:
        raise ValueError(
            f"--log {name} needs a package that is not installed ({error}); `pip install {name}`"
        ) from error


def open_logger(name: str, folder: Path) -> tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]:
    """'tensorboard' | 'wandb' -> write(step, values) and close(). Raises ValueError when the package is missing."""
    check_logger(name)
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def write(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return write, writer.close
    import wandb

    run = wandb.init(project="fastrl", name=folder.name, dir=str(folder))
    return lambda step, values: run.log(values, step=step), run.finish


def versions() -> dict[str, str]:
    """What a result depends on: versions of what is installed, and the commit of the checkout where there is one.

    Raises nothing for what is missing: a result is worth more than its report.
    """
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {}
    for name in ("fastrl", "transformers", "tokenizers", "safetensors", "math-verify"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    found |= {"python": sys.version.split()[0], "torch": torch.__version__}
    ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.TimeoutExpired):  # no git, or one that waits for a file system
        git = subprocess.run(ask, capture_output=True, text=True, timeout=10)  # noqa: S603
        found |= {"commit": git.stdout.strip()} if git.returncode == 0 else {}
    return found
