"""What a run and its continuation must have in common, and what must be said aloud where they differ."""

import json
from collections.abc import Sequence
from pathlib import Path

from fastrl.base.types import CheckpointError, Problem
from fastrl.models.policy import Policy
from fastrl.models.reference import Reference
from fastrl.passrates.key import digest
from fastrl.settings.run import by_path

ABSENT = "not there"
# digest -> what it means that it is another one now
MEANING = {
    "architecture": "the model has other tensors",
    "problems": "the data has other problems or answers under the same name",
    "prompts": "the tokenizer writes other ids for the same problems, as a chat template with today's date in it does "
    "every day: fix the date by --template-args, where the template reads one",
    "reference": "the model that the run started from has other weights",
    "tokenizer": "the tokenizer has other tokens, another end of text or another chat template",
}


def identity_of(policy: Policy, reference: Reference | None, problems: Sequence[Problem]) -> dict[str, str]:
    """Digests of what the settings only name: a folder or a file may hold something else by now."""
    tokenizer = policy.tokenizer
    return {
        "architecture": digest([name, list(slot.shape)] for name, slot in policy.flat.slots.items()),
        "tokenizer": digest([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token, str(tokenizer.chat_template)]),
        "problems": digest([p.id, p.prompt, p.answer] for p in problems),
        "prompts": digest(p.prompt_ids for p in problems),
        "reference": reference.sha256() if reference else "",
    }


def check_same(then: dict, now: dict, allowed: set[str], path: Path) -> None:
    """Raise CheckpointError, naming it, when a setting of a run or a digest of its identity is another one now.

    allowed: paths that may differ, such as `allocation.group_size`, or `allocation` with all that is in it.
    """
    before, after = by_path(then), by_path(json.loads(json.dumps(now)))
    free = {name.replace("-", "_") for name in allowed}
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, ABSENT), after.get(name, ABSENT)
        words = name.split(".")
        if old != new and not any(".".join(words[:n]) in free for n in range(1, len(words) + 1)):
            meaning = f" ({MEANING[name]})" if name in MEANING else ""
            raise CheckpointError(
                f"{path}: {name} was {str(old)[:200]} and is now {str(new)[:200]}{meaning}; start with the old one, or "
                f"say --allow-change {name}"
            )
