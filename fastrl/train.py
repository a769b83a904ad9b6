"""Train a model by reinforcement learning with verifiable rewards.

    python -m fastrl.train                                             embedded model and task, on a CPU
    python -m fastrl.train --model DIR --data gsm8k --steps 200        a Hugging Face model on real problems
    python -m fastrl.train recipe.toml --lr 2e-6 --dry-run             a recipe, changed, only shown
    python -m fastrl.train --resume auto                               go on where the last run stopped

The run folder is runs/NAME. Exit codes: 0 done, 2 configuration, 3 data, 4 numerics, 5 engine or worker lost,
6 checkpoint, 75 stopped by a signal after a committed save, 130 second Ctrl-C.
"""

import json
import os
import signal
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from fastrl import checkpoint
from fastrl.base import faults, ranks
from fastrl.base.exits import exit_code, fail, run_program
from fastrl.base.log import RunLog, check_logger, printable, say, versions, write_json
from fastrl.base.spans import Progress, Spans, collector_paused
from fastrl.base.types import EngineError, NumericsError
from fastrl.base.versions import check_versions
from fastrl.engine.segments import set_segments
from fastrl.memory.watch import outcome
from fastrl.models.loading import load_tokenizer, model_path
from fastrl.rewards import RewardSet
from fastrl.run.build import build
from fastrl.run.problems import check_fit, load_work
from fastrl.run.resolve import Resolved, describe, memory_lines, resolve
from fastrl.run.resume import resume
from fastrl.run.sampling import open_rewards, wanted_profile
from fastrl.settings.parse import as_dict
from fastrl.settings.run import TrainConfig, configure
from fastrl.step.trainer import Stopped, Trainer
from fastrl.watch.card_watch import CardWatch
from fastrl.watch.watchdog import Watchdog, longest_wait

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """SIGINT and SIGTERM: the first asks the trainer to save and stop, the second ends the process.

    The second one is seen by a thread of its own: Python runs a handler only when the main thread is back from C, and a
    collective that waits for a lost rank never is.
    """

    def __init__(self, log: RunLog):
        self.log, self.requested = log, False
        self.trainer: Trainer | None = None
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in SIGNALS:
            signal.signal(number, self.handle)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self.watch, args=(reader,), daemon=True).start()

    def handle(self, number: int, frame) -> None:
        self.requested = True

    def watch(self, reader: int) -> None:
        """Read the number of every signal that comes, a byte each."""
        seen = 0
        while byte := os.read(reader, 1):
            seen += byte[0] in SIGNALS
            if seen == 2:
                step, saved = where(self.trainer)
                self.log.status("interrupted", step, saved, 130, "second signal before the checkpoint was complete")
                os._exit(130)

    def __call__(self) -> bool:
        return self.requested


def where(trainer: Trainer | None) -> tuple[int, str | None]:
    """Steps completed and the last checkpoint, for status.json."""
    if trainer is None:
        return 0, None
    return trainer.completed, str(trainer.last_checkpoint) if trainer.last_checkpoint else None


def leave_status(
    log: RunLog, trainer: Trainer | None, reason: str, code: int, message: str, phase: str, *, last_word: bool = False
) -> None:
    """status.json of a run that was cut short. One that never began leaves what an earlier run has said."""
    if trainer is not None or not has_run(log.folder):
        log.status(reason, *where(trainer), code, message, phase, last_word=last_word)


def watchdog_of(config: TrainConfig, spans: Spans, log: RunLog, stop: StopFlag) -> Watchdog:
    def report(progress: Progress, message: str) -> None:
        code = EngineError.exit_code
        leave_status(log, stop.trainer, "hang", code, message, progress.phase, last_word=True)

    def others_noticed() -> None:
        log.ended = True

    wait = config.stopping.hang_timeout
    return Watchdog(spans, wait, config.run.folder, report=report, others_noticed=others_noticed)


def has_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists()


def fresh_folder(folder: Path) -> None:
    """Move an earlier run of this name out of the way; nothing is overwritten."""
    if has_run(folder):
        number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}.{number}"))


def summary(log: RunLog) -> list[str]:
    """Memory, and the first against the last evaluation; of rank 0, which alone knows when the file is whole."""
    if log.quiet:
        return []
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    lines = outcome(rows)
    evals = [row for row in rows if any(key.startswith("eval/") for key in row)]
    if len(evals) < 2:
        return lines
    first, last = evals[0], evals[-1]
    lines.append(f"{'':32} {'before':>8} {'after':>8}")
    for key in first:
        if key.startswith("eval/") and "ci95" not in key and not key.endswith("num_problems") and key in last:
            lines.append(f"{key.removeprefix('eval/'):32} {first[key]:8.3f} {last[key]:8.3f}")
    return lines


def same_commits(config: TrainConfig) -> None:
    """Raise ValueError where ranks have resolved a name of the hub to other commits: it has moved just now."""
    resolved = [config.model, config.data, *config.evaluation.eval]
    others = [each for each in ranks.gather(resolved) if each != resolved]
    if others:
        raise ValueError(f"one rank reads {', '.join(resolved)} and another {', '.join(others[0])}; start again")


def look_over(resolved: Resolved, rewards: RewardSet) -> None:
    """A dry run: the plan, and what would end the run before its first step. Reads no weights, writes nothing."""
    config = resolved.config
    print(json.dumps(as_dict(config), indent=2))
    say("\n".join([*describe(resolved), *memory_lines(resolved)]))
    for name in config.run.log:
        check_logger(name)
    work = load_work(config, load_tokenizer(config.model), rewards)
    say("\n".join(work.report))
    check_fit(config, work.problems, RunLog(config.run.folder, total_steps=config.run.steps))
    if wanted := wanted_profile(config, work.task.problems):
        say(wanted.said)


def main(argv: list[str]) -> int:
    started = time.monotonic()
    check_versions()
    config = configure(argv)
    planned = faults.from_environment().planned
    resolved = resolve(config)
    allocator = set_segments(config.engine, resolved.device)
    rewards = open_rewards(config)
    if config.run.dry_run:
        with rewards:
            look_over(replace(resolved, config=config.pinned()), rewards)
        return 0
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        ranks.start(resolved.device, longest_wait(config.stopping.hang_timeout))
    except EngineError as error:
        return fail(error)
    checkpoint.seed_generators(config.seed + ranks.rank())
    quiet = ranks.rank() > 0
    log = RunLog(config.run.folder, total_steps=config.run.steps, quiet=quiet)
    stop, spans = StopFlag(log), Spans()
    watchdog = watchdog_of(config, spans, log, stop)
    card = CardWatch(resolved.card, spans, log.say)
    trainer = None
    try:
        for fault in planned:
            log.say(f"WARNING: FASTRL_FAULT is set, this run will be broken on purpose: {fault}")
        config = config.pinned()
        same_commits(config)
        resolved = replace(resolved, config=config)
        model_path(config.model, weights=True)  # fetched before anybody waits for progress
        watchdog.start()
        card.start()
        for line in [*describe(resolved), *([allocator] if allocator else [])]:
            log.say(line)
        with collector_paused():
            trainer = stop.trainer = build(resolved, log, rewards, stop, spans, card)
        if config.run.resume:
            resume(trainer, config.run.resume, config)
        elif not quiet:
            fresh_folder(config.run.folder)
        log.open(config.run.log)
        ranks.barrier()
        if not quiet:
            write_json(config.run.folder / "config.json", as_dict(config))
            write_json(config.run.folder / "manifest.json", {"versions": versions(), "argv": argv})
        # until it is replaced: a process that is killed, or that a reward function ends, has not come to its end
        log.status("running", *where(trainer), None)
        log.say(f"start-up took {time.monotonic() - started:.1f} s")
        reason = trainer.run()
        kwh = card.run_kwh()
        code = 75 if reason == "stopped" else 0
        message = "continue with the same command and --resume auto" if code else trainer.signal.outcome()
        log.status(reason, *where(trainer), code, message)
        if kwh is not None:
            log.metrics(trainer.completed, {"energy/run_kwh": kwh})
        for line in summary(log) if code == 0 else []:
            log.say(line)
        if code == 0:
            log.curve()
        log.close()
        took = f"{time.monotonic() - started:.0f} s" + ("" if kwh is None else f" and {kwh:.4g} kWh of the GPUs")
        log.say(f"{reason} at step {trainer.completed} after {took}; {config.run.folder}  {message}")
        ranks.barrier()  # a rank that leaves early would abort the others' last collective
    except BaseException as error:
        phase = spans.progress.phase
        if isinstance(error, EngineError) and phase:
            error.args = (f"{error} (step {where(trainer)[0] + 1}, phase {phase})",)
        leave_status(log, trainer, type(error).__name__, exit_code(error), str(error), phase)
        if trainer is not None and config.run.folder.exists():
            name = f"traceback-rank{ranks.rank()}.txt" if quiet else "traceback.txt"
            (config.run.folder / name).write_text(printable(traceback.format_exc()))
        if isinstance(error, (ValueError, EngineError, NumericsError, Stopped)):
            return fail(error)
        raise
    finally:
        rewards.close()
        if trainer is not None:
            trainer.rollout.engine.close()
        ranks.stop()
        watchdog.stop()
        card.stop()
    return code


if __name__ == "__main__":
    run_program(lambda argv: ranks.end(main(argv)))
