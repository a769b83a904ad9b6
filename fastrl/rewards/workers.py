"""Processes that can be killed: tasks in, replies out, and no task can hang or change the reply of another.

Each worker is a fresh interpreter with a pipe of its own, one task at a time. It is started by exec and not by
multiprocessing, which imports the main module again in every child: for `python -m fastrl.train` that is torch. Exec is
also safe beside CUDA, in any thread, in a notebook and in a script without a main guard. A killed worker is noticed by
the end of its pipe; nothing is shared that it could leave locked.
"""

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence

TRIES = 3  # a task is blamed only if this many workers in a row are lost under it
START_S = 60.0  # wall time for a worker to import its libraries on a busy machine

# No secrets of the trainer. Sets iterate in one order in every worker. gmpy2 would make sympy run for minutes inside C
# code that no signal handler can interrupt.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1"}
INHERITED = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "HOME", "LANG")


class Worker:
    """One process and what it is doing. A reply is a single JSON line."""

    def __init__(self, command: list[str]):
        inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
        # the command is ours; the texts travel through the pipe
        self.process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=inherited | ENVIRONMENT
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.ready = False
        self.task: int | None = None
        self.deadline = time.monotonic() + START_S
        self.received = b""

    @property
    def is_busy(self) -> bool:
        return self.task is not None or not self.ready

    def send(self, message: object) -> None:
        """Raises BrokenPipeError if the process has ended."""
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[self.requests.write(data) :]

    def receive(self) -> str | None:
        """The reply, or None if it is not complete yet. Raises EOFError if the process has ended."""
        data = os.read(self.replies.fileno(), 4096)
        if not data:
            raise EOFError
        self.received += data
        if not self.received.endswith(b"\n"):
            return None
        line, self.received = self.received, b""
        return json.loads(line)

    def kill(self) -> int:
        """Ends the process if it still runs -> its exit code, minus the signal if one ended it."""
        self.process.kill()
        for pipe in (self.requests, self.replies):
            pipe.close()
        return self.process.wait()


class Workers:
    """`run` sends tasks to at most `count` processes of `script` and collects one reply per task.

    The processes start with the first task and stay until `close`. Every method may be called from any thread.
    """

    def __init__(self, script: str, arguments: list, *, count: int, wall_s: float, kill_signal: int):
        """script: path of a Python file. kill_signal: what ends a worker that is stuck in its task (no second try)."""
        if count < 1:
            raise ValueError(f"workers: got {count}; expected at least 1")
        # -P: the folder of the script holds a math.py
        self.command = [sys.executable, "-P", script, json.dumps(arguments)]
        self.count, self.wall_s, self.kill_signal = count, wall_s, kill_signal
        self.workers: list[Worker] = []
        self.failed_starts = 0
        self.lock = threading.Lock()

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self.workers]

    def run(self, tasks: Sequence[object]) -> list[str]:
        """JSON-able tasks -> the reply to each, or "hard_timeout" or "died".

        Raises EngineError if the workers cannot be started.
        """
        with self.lock:
            try:
                return self.run_locked(tasks)
            except BaseException:
                # replies to an abandoned call must not meet the next one
                self.close_locked()
                raise

    def run_locked(self, tasks: Sequence[object]) -> list[str]:
        replies = [""] * len(tasks)
        losses = [0] * len(tasks)
        waiting = deque(range(len(tasks)))
        unanswered = len(tasks)
        while unanswered:
            while len(self.workers) < min(self.count, unanswered):
                self.workers.append(Worker(self.command))
            for worker in self.workers:
                if worker.ready and worker.task is None and waiting:
                    worker.task, worker.deadline = waiting.popleft(), time.monotonic() + self.wall_s
                    try:
                        worker.send(tasks[worker.task])
                    except BrokenPipeError:
                        pass  # its pipe ends too, which is handled below
            for worker, reply in self.wait():
                task, worker.task = worker.task, None
                if task is None:
                    continue  # lost while it was idle or starting
                losses[task] += reply == "died"
                if reply == "died" and losses[task] < TRIES:
                    waiting.appendleft(task)
                else:
                    replies[task] = reply
                    unanswered -= 1
        return replies

    def wait(self) -> list[tuple[Worker, str]]:
        """Blocks until something happens -> the workers that replied or were lost, with the reply."""
        events = []
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            first_deadline = min(worker.deadline for worker in self.workers if worker.is_busy)
            readable = {key.data for key, _ in selector.select(max(0.0, first_deadline - time.monotonic()))}
        for worker in list(self.workers):
            try:
                if worker in readable and (reply := worker.receive()) is not None:
                    if worker.ready:
                        events.append((worker, reply))
                    else:
                        worker.ready, self.failed_starts = True, 0
                elif worker.is_busy and time.monotonic() > worker.deadline:
                    events.append((worker, self.lose(worker, "hard_timeout")))
            except EOFError:
                events.append((worker, self.lose(worker, "died")))
        return events

    def lose(self, worker: Worker, status: str) -> str:
        self.workers.remove(worker)
        exit_code = worker.kill()
        if not worker.ready:
            self.failed_starts += 1
            if self.failed_starts >= TRIES * self.count:
                from fastrl.base.types import EngineError  # loads torch, which a program that only grades does not need

                raise EngineError(
                    f"reward workers: {self.failed_starts} processes in a row ended before they were ready, the last "
                    f"one with exit code {exit_code}; its error stands above. Try: {' '.join(self.command)}"
                )
        return "hard_timeout" if exit_code == -self.kill_signal else status

    def close(self) -> None:
        """Ends all processes. The next `run` starts new ones."""
        with self.lock:
            self.close_locked()

    def close_locked(self) -> None:
        while self.workers:
            self.workers.pop().kill()
