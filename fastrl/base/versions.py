"""The versions fastrl needs at least, as its package says; older ones have holes that its own checks cannot close.

torch below 2.10 corrupts memory in torch.load with weights_only (CVE-2026-24747), transformers below 5.0 unpickles a
trainer's state (CVE-2026-1839), vLLM below 0.18 runs a model's code against trust_remote_code=False (CVE-2025-66448,
CVE-2026-22807, CVE-2026-27893), safetensors below 0.8 does not write atomically.
"""

import re
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, requires, version

CHECKED = ("torch", "transformers", "safetensors", "tokenizers", "vllm")
REQUIREMENT = re.compile(r"([A-Za-z0-9_-]+)\s*(?:\[.*\])?([^;]*)")


def release(text: str) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13); '5.0rc1' -> (5,): the numbers before anything else, zeros at the end left out.

    () of a name without a number in front, as a build of one's own may have.
    """
    found = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(n) for n in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def lowest(requirements: Iterable[str]) -> dict[str, str]:
    """Lines as in a package's metadata -> the lower bound of each checked name: 'vllm<0.33,>=0.26' -> '0.26'."""
    found = {}
    for line in requirements:
        parts = REQUIREMENT.match(line)
        assert parts is not None, line
        name, bounds = parts.groups()
        bound = re.search(r"(?:>=|==)\s*([0-9][0-9.]*)", bounds)
        if name in CHECKED and bound:
            found[name] = bound[1]
    return found


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_versions(version_of: Callable[[str], str | None] = installed) -> dict[str, tuple[str | None, str]]:
    """-> {name: (installed version or None, lowest)}. Raises ValueError, with what helps, for an older one.

    Empty in a checkout that is not installed: what it needs stands in its package's metadata.
    """
    try:
        needed = lowest(requires("fastrl") or ())
    except PackageNotFoundError:
        return {}
    found = {name: (version_of(name), needed[name]) for name in CHECKED if name in needed}
    old = {}
    for name, (have, least) in found.items():
        if have is not None and release(have) and release(have) < release(least):
            old[name] = have, least
    if old:
        said = ", ".join(f"{name} {have} is installed and {least} is the lowest" for name, (have, least) in old.items())
        wanted = " ".join(f"'{name}>={least}'" for name, (_, least) in old.items())
        raise ValueError(f"{said} that fastrl works with; run `pip install -U {wanted}`")
    return found
