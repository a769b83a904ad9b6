"""Ends a run that has stopped making progress, and writes down where every thread of every rank stood.

A thread of its own looks at `Spans.progress`, so it works while the main thread is in a call that never returns, if
that call has released Python's lock: gloo, CUDA, files, locks and subprocesses do. It ends the process by os._exit,
whereupon torchrun ends the others. All ranks of a run see each other's stack files, so all of them write theirs first.
"""

import faulthandler
import os
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Thread

from fastrl.base import ranks
from fastrl.base.log import printable
from fastrl.base.spans import Progress, Spans
from fastrl.base.types import EngineError

FIRST = 3.0  # times the timeout while a phase is entered for the first time: kernels compile, caches are cold
USUAL = 5.0  # times the median of what a phase has taken so far without a sign of progress
HISTORY = 51  # visits of a phase that are remembered
REPORT_S = 30.0  # for stacks and status.json, on a file system that may be what hangs


def longest_wait(timeout_s: float) -> float:
    """Seconds for the collectives: later than the watchdogs of all ranks, which know more; 0 where there are none."""
    return FIRST * timeout_s + 2 * REPORT_S if timeout_s else 0.0


@dataclass
class Patience:
    """How long nothing may happen: max(timeout, USUAL x median of the longest pauses in earlier visits of the phase).

    `look` is to be called every `tick` seconds. When it was not for much longer, neither this thread nor the others had
    run: the process was stopped, or the machine asleep. That time does not count.
    """

    timeout_s: float
    tick: float
    pauses: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=HISTORY)))
    seen: Progress = Progress("", 0, 0.0)
    longest: float = 0.0  # pause of this visit, seconds
    looked: float = field(default_factory=time.monotonic)
    awake_since: float = 0.0

    def look(self, progress: Progress, now: float) -> float:
        """Seconds since the last progress if that is too long, else 0."""
        if now - self.looked > 5 * self.tick + 1:
            self.awake_since = now
        self.looked = now
        if progress[:2] != self.seen[:2]:
            self.pauses[self.seen.phase].append(self.longest)
            self.longest = 0.0
        self.seen = progress
        pause = now - max(progress.at, self.awake_since)
        self.longest = max(self.longest, pause)
        return pause if progress.phase and pause > self.limit(progress) else 0.0

    def limit(self, progress: Progress) -> float:
        usual = USUAL * statistics.median(self.pauses[progress.phase] or [0.0])
        return max((FIRST if progress.visit == 1 else 1.0) * self.timeout_s, usual)


class Watchdog:
    """From `start` to `stop`, ends the process with exit code 5 when nothing happens in `spans` for too long.

    report(progress, message) is called on the rank that notices first; it shall write status.json. others_noticed() is
    called on the others.
    """

    def __init__(
        self,
        spans: Spans,
        timeout_s: float,
        folder: Path,
        *,
        report: Callable[[Progress, str], None],
        others_noticed: Callable[[], None],
    ):
        """timeout_s: without any progress, seconds; 0 = never."""
        self.spans, self.timeout_s, self.folder = spans, timeout_s, folder
        self.report, self.others_noticed = report, others_noticed
        self.tick = min(5.0, timeout_s / 20)
        self.stopped, self.only_one = Event(), Lock()
        self.launch = ""  # names this start of the run in its stack files; those of an earlier one are no alarm

    def start(self) -> None:
        """On all ranks at once."""
        if not self.timeout_s:
            return
        self.launch = f"launch {ranks.all_max(time.time()):.3f}"
        Thread(target=self.watch, name="watchdog", daemon=True).start()
        if ranks.size() > 1:
            Thread(target=self.follow, name="watchdog of other ranks", daemon=True).start()

    def stop(self) -> None:
        self.stopped.set()

    def watch(self) -> None:
        patience = Patience(self.timeout_s, self.tick)
        while not self.stopped.wait(self.tick):
            progress = self.spans.progress
            pause = patience.look(progress, time.monotonic())
            if pause:
                self.end(progress, f"no progress for {pause:.0f} s in phase {progress.phase}", notices=True)

    def follow(self) -> None:
        """Files are looked at in a thread of their own: theirs may be the file system that hangs."""
        while not self.stopped.wait(self.tick):
            if self.noticed_by_others():
                progress = self.spans.progress
                pause = time.monotonic() - progress.at
                self.end(progress, f"another rank hangs; here the last progress was {pause:.0f} s ago", notices=False)

    def noticed_by_others(self) -> list[int]:
        """Ranks that have written their stacks since this start of the run."""
        return [rank for rank in range(ranks.size()) if rank != ranks.rank() and self.has_stacks(rank)]

    def stacks(self, rank: int) -> Path:
        return self.folder / f"stacks-rank{rank}.txt"

    def has_stacks(self, rank: int) -> bool:
        try:
            with self.stacks(rank).open() as file:
                return self.launch in file.readline()
        except OSError:
            return False

    def end(self, progress: Progress, message: str, *, notices: bool) -> None:
        """Write everything down, as far as REPORT_S allows, and leave."""
        self.only_one.acquire()  # and never released: the process ends
        writer = Thread(target=self.write, args=(progress, message, notices), daemon=True)
        writer.start()
        writer.join(REPORT_S)
        os._exit(EngineError.exit_code)

    def write(self, progress: Progress, message: str, notices: bool) -> None:
        headline = f"rank {ranks.rank()} of {ranks.size()}: {message}"
        try:
            if notices and not self.noticed_by_others():
                self.report(progress, headline)
            else:
                self.others_noticed()
        finally:  # a report that fails must not cost the stacks
            self.write_stacks(headline)
        # said before the others end: the main thread, which they free by that, would end this process
        print(printable(f"fastrl: error: hang: {headline}; stacks in {self.folder}"), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2)
        self.await_others()
        if notices:
            time.sleep(2 * self.tick)  # others first: an error here about their end would be the wrong last word

    def write_stacks(self, headline: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.stacks(ranks.rank()).open("w") as file:
            file.write(f"{headline}, {self.launch}\n")
            file.flush()
            faulthandler.dump_traceback(file)

    def await_others(self) -> None:
        end = time.monotonic() + min(REPORT_S / 2, 10 * self.tick)
        while len(self.noticed_by_others()) < ranks.size() - 1 and time.monotonic() < end:
            time.sleep(self.tick / 4)
