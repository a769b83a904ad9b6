"""The program as a user starts it, under torchrun where there are several ranks, and every process that it starts."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path


class ProcessTree:
    """`python -m fastrl.train ARGS` in `folder`, under torchrun where there are several ranks.

    Every process it starts, however deep and wherever it is reparented to, has a word of its own in its PATH, which is
    among the few variables that workers inherit.
    """

    def __init__(self, folder: Path, *args: object, ranks: int = 1, restarts: int = 0, **environment: str):
        self.word = f"/{uuid.uuid4().hex}"
        self.out, self.err = folder / "stdout.txt", folder / "stderr.txt"
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            f"--max-restarts={restarts}",
        ]
        command = [sys.executable, *(torchrun if ranks > 1 else []), "-m", "fastrl.train", *map(str, args)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment, "PATH": f"{os.environ['PATH']}:{self.word}"}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=err)

    def wait(self, timeout: float = 200) -> int:
        """The exit code. Nothing of the program outlives the wait."""
        try:
            return self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                for pid in self.living():
                    os.kill(pid, 9)
                self.process.wait()

    def living(self) -> list[int]:
        """Processes that it has started and that have not ended."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.word.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                pass  # it has ended, or belongs to somebody else
        return found

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        for pid in self.living():
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={number}".encode() in environment:
                return pid
        raise LookupError(f"rank {number} does not run")

    def left(self, within_s: float = 5.0) -> list[int]:
        """Processes that are still there a little after the end."""
        until(lambda: not self.living(), within_s)
        return self.living()


def until(condition, timeout: float = 120) -> bool:
    """Wait for a condition -> whether it came true in time."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True
