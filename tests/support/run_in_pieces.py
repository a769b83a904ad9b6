"""A run in pieces: each is forked from a trainer that was built once, goes on from the newest checkpoint, and ends.

What happens to a piece, a signal or a fault, leaves this process alone; what it had on the disk stays.
"""

import hashlib
import os
import signal
import time
import traceback
from pathlib import Path

import torch

from fastrl import checkpoint
from fastrl.base import faults
from fastrl.base.exits import exit_code
from fastrl.run.resume import resume
from fastrl.settings.parse import parse
from fastrl.settings.run import AXES, EMBEDDED_RECIPE, TrainConfig
from support.trainers import make_trainer

ARGS = """
    --problems-per-step 2 --group-size 4 --limit 30 --eval-limit 2 --eval-k 1 --sample-every 0 --save-every 1
    --reward last_character
""".split()


class RunInPieces:
    """Pieces of the run that `args` describe."""

    def __init__(self, built: Path, *args: object):
        torch.set_num_threads(1)
        self.args = [*ARGS, *map(str, args)]
        self.trainer, self.twin = (make_trainer(built / name, *self.args) for name in ("trainer", "twin"))
        self.trainer.eval_sets = []
        self.known: list[str] = []  # digests of the undisturbed run after 1, 2, ... steps

    def start(self, folder: Path, steps: int, fault: str = "") -> int:
        """The process that trains in `folder` until there are `steps`; its exit code is that of its error, or 0."""
        folder.mkdir(exist_ok=True)
        (folder / "said.txt").unlink(missing_ok=True)
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.environ["FASTRL_FAULT"] = fault
            faults.from_environment.cache_clear()
            trainer, log = self.trainer, self.trainer.log
            trainer.folder, log.folder, log.path = folder, folder, folder / "metrics.jsonl"
            log.say = lambda line: os.write(1, f"{line}\n".encode())
            trainer.schedule.steps = steps
            checkpoint.seed_generators(0)
            argv = [str(EMBEDDED_RECIPE), "--out", str(folder), *self.args]
            resume(trainer, "auto", parse(TrainConfig, argv, AXES))
            trainer.run()
            code = 0
        except BaseException as error:  # whatever it is, this process must not go on with the tests
            os.write(2, traceback.format_exc().encode())
            code = exit_code(error)
        finally:
            os._exit(code)

    def run(self, folder: Path, steps: int, fault: str = "", timeout: float = 200) -> tuple[int, str]:
        """A piece to its end -> its exit code, negative for a signal, and what it said."""
        return ended(self.start(folder, steps, fault), timeout), (folder / "said.txt").read_text()

    def kill(self, folder: Path, delay_s: float) -> None:
        """A piece that would never end, killed that long after it has begun."""
        child = self.start(folder, 10**6)
        said = folder / "said.txt"
        while not said.exists() or "resume:" not in said.read_text():
            time.sleep(0.005)
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -9

    def expected(self, step: int) -> str:
        """`digest_of` the checkpoint that the undisturbed run has after `step` steps."""
        with checkpoint.generators_kept():
            while len(self.known) < step:
                checkpoint.seed_generators(0)  # nothing of this run draws from them
                self.twin.step()
                self.known.append(digest_of(dict(self.twin.learner.state_tensors())))
        return self.known[step - 1]

    def check(self, folder: Path) -> int:
        """The newest checkpoint is whole and that of the undisturbed run -> its step, 0 if there is none."""
        found = checkpoint.newest(folder / "checkpoints")
        if not found:
            return 0
        with checkpoint.generators_kept():
            state, tensors = checkpoint.load(found[0], self.trainer.learner.shard_sizes())
        assert digest_of(tensors) == self.expected(state["step"])
        return state["step"]


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(name.encode())
        hashed.update(tensor.cpu().contiguous().numpy())
    return hashed.hexdigest()


def ended(child: int, timeout: float = 200) -> int:
    """Wait for a child -> its exit code; one that does not end is killed."""
    end = time.monotonic() + timeout
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"still running after {timeout} s")
        time.sleep(0.005)
