"""Commands one after the other, each alone and with a time limit, and a file of what each gave as soon as it has ended.

A stage that fails or hangs stops no other: at its limit it ends with every process of its group. In its command {out}
is a file that it may write a JSON document into as often as it likes; what was written last is its result, whatever
becomes of it. FOLDER/STAGE.json has the result, FOLDER/STAGE.log what it printed, FOLDER/summary.json one line of each.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastrl.base.log import say, write_json

LEAST_S = 10  # with less left nothing is begun: it would not get beyond its imports
TAIL = 3000  # characters of what a stage printed that its file keeps where it failed
SKIPPED, TIMEOUT, RUNNING = "skipped", "timeout", "running"  # in place of an exit code


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    limit: int  # seconds
    command: tuple[str, ...]
    shows: str  # what one learns from it
    needs: str = ""  # a package without which it is skipped


def run_stages(stages: list[Stage], folder: Path, *, budget: float, about: dict, resume: bool = False) -> list[dict]:
    """Results in the order of `stages`. budget: seconds in all; about: what every file says besides.

    resume: what the folder has a good result of is left as it is, and what is skipped leaves an earlier result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end, results, summary = time.monotonic() + budget, [], folder / "summary.json"
    known = {s["stage"]: s for s in json.loads(summary.read_text())["stages"]} if summary.exists() else {}
    for stage in stages:
        path = folder / f"{stage.name}.json"
        before = json.loads(path.read_text()) if resume and path.exists() else None
        result = before
        if before is None or before["rc"] != 0:
            result = {"stage": stage.name, "shows": stage.shows, "limit": stage.limit, **about}
            left = end - time.monotonic()
            if stage.needs and importlib.util.find_spec(stage.needs) is None:
                result |= {"rc": SKIPPED, "says": f"{stage.needs} is not installed"}
            elif left < LEAST_S:
                result |= {"rc": SKIPPED, "says": "no time left"}
            else:
                write_json(path, result | {"rc": RUNNING})
                result |= run(stage, folder, min(stage.limit, left))
            say(f"{stage.name:20} {result['rc']!s:>8} {result.get('seconds', 0):7.1f} s  {result['says']}")
            result = before if before and result["rc"] == SKIPPED else result
            write_json(path, result)
        results.append(result)
        known[stage.name] = in_short(result)
        write_json(summary, about | {"stages": list(known.values())})
    return results


def in_short(result: dict) -> dict:
    return {key: result[key] for key in ("stage", "rc", "seconds", "says") if key in result}


def run(stage: Stage, folder: Path, limit: float) -> dict:
    """Exit code or "timeout", seconds, document and a line about it; where it failed, the end of what it printed."""
    partial, log = folder / f"{stage.name}.partial.json", folder / f"{stage.name}.log"
    partial.unlink(missing_ok=True)
    command = [word.replace("{out}", str(partial)) for word in stage.command]
    scratch = Path(tempfile.mkdtemp(prefix="fastrl_"))
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}
    # what torch.compile has made for one stage serves the next
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "fastrl_inductor"))
    begin = time.monotonic()
    with log.open("wb") as file:  # no pipe: a process that outlives its parent would keep one open
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            rc = process.wait(limit)
        except subprocess.TimeoutExpired:
            rc = TIMEOUT
        finally:  # also at Ctrl-C, and what a stage that has ended has left behind
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            shutil.rmtree(scratch, ignore_errors=True)
    found = {"command": " ".join(command), "rc": rc, "seconds": round(time.monotonic() - begin, 1)}
    document: dict = {}
    if partial.exists():
        with suppress(ValueError):  # it did not replace the file in one step, and was killed on the way
            document = json.loads(partial.read_text())
        partial.unlink()
    if rc == 0:
        return found | {"says": document.get("says", ""), "result": document}
    printed = log.read_text(errors="replace")
    last = next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "")
    says = "; ".join(part for part in (document.get("says"), last[:200]) if part)
    return found | {"says": says, "result": document, "tail": printed[-TAIL:]}
