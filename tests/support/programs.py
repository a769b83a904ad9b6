"""`python -m fastrl.train` and other programs many times over, forked from a process that has imported them already.

A run has an interpreter state of its own, its own folder, environment and signals, and ends as the program does; what
it saves is the seconds of imports.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "fastrl.train",
        "fastrl.evaluate",
        "fastrl.compare",
        "transformers",
        "transformers.models.qwen2.modeling_qwen2",
        "matplotlib.pyplot",
    ]
)


def main(module: str, cwd: str, argv: list[str], environment: dict[str, str], out: str, err: str) -> None:
    os.chdir(cwd)
    os.environ.update(environment)
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1 if err == out else os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = [module, *argv]
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        sys.modules.pop(module, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)


class Run:
    """A run that has been started in `cwd`. Environment variables may be named. `err`: whether stderr stays apart.

    module: a program's, or the path of a script.
    """

    def __init__(self, cwd: Path, *args: object, module: str = "fastrl.train", err: bool = False, **environment: str):
        self.folder = tempfile.mkdtemp(prefix=".said-", dir=cwd)
        self.out = f"{self.folder}/out.txt"
        self.err = f"{self.folder}/err.txt" if err else self.out
        argv = [*map(str, args)]
        self.process = CONTEXT.Process(target=main, args=(module, str(cwd), argv, environment, self.out, self.err))
        self.process.start()

    @property
    def text(self) -> str:
        """Everything said so far, on both streams if they are not apart."""
        return Path(self.out).read_text(errors="replace") if Path(self.out).exists() else ""

    def wait(self, timeout: float = 200) -> int:
        """The exit code, negative for a signal."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s: {self.text[-2000:]}")
        return self.process.exitcode

    def wait_for(self, text: str, timeout: float = 200) -> None:
        """Until it has said `text`."""
        end = time.monotonic() + timeout
        while text not in self.text:
            assert self.process.is_alive() and time.monotonic() < end, self.text[-2000:]
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


def run(cwd: Path, *args: object, code: int = 0, **environment: str) -> str:
    """A whole run that must end with `code` -> what it said."""
    started = Run(cwd, *args, **environment)
    found = started.wait()
    assert found == code, f"exit code {found} instead of {code}: {started.text[-3000:]}"
    return started.text


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ranks(folder, count: int, *args: object, **environment: str) -> list[Run]:
    """A run of `count` ranks in `folder`, as torchrun starts them."""
    port = str(free_port())
    return [
        Run(
            folder,
            *args,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            **environment,
        )
        for rank in range(count)
    ]


def together(folder: Path, script: str, count: int = 2, timeout: float = 250) -> str:
    """Run the text of a script on `count` ranks -> what they said. The first that fails ends them all."""
    path = folder / f"script{count}.py"
    path.write_text(script)
    runs = ranks(folder, count, module=str(path))
    end = time.monotonic() + timeout
    while any(run.process.is_alive() for run in runs):
        if time.monotonic() > end or any(run.process.exitcode for run in runs):
            for run in runs:
                run.process.kill()
        time.sleep(0.02)
    said = "".join(run.text for run in runs)
    codes = [run.process.exitcode for run in runs]
    assert codes == [0] * count, f"exit codes {codes}: {said[-3000:]}"
    return said
