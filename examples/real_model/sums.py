"""Sums of two numbers up to 12 for a model that can nearly add, and a reward that says how near it came.

python examples/real_model/sums.py FOLDER      writes sums_train.jsonl and sums_test.jsonl, which have no sum in common
"""

import json
import random
import re
import sys
from pathlib import Path

LARGEST = 12
TEST_SUMS = 40
SHOTS = [(3, 4), (9, 8), (6, 6)]  # shown in each prompt; they are in neither file


def messages(a: int, b: int) -> list[dict[str, str]]:
    """The chat that ends with the question "a + b", after the answers to SHOTS."""
    said = [{"role": "system", "content": "Add."}]
    for x, y in SHOTS:
        said += [{"role": "user", "content": f"{x} + {y}"}, {"role": "assistant", "content": str(x + y)}]
    return [*said, {"role": "user", "content": f"{a} + {b}"}]


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1) if (a, b) not in SHOTS]
    random.Random(0).shuffle(pairs)
    for name, some in (("test", pairs[:TEST_SUMS]), ("train", pairs[TEST_SUMS:])):
        rows = [json.dumps({"prompt": messages(a, b), "answer": str(a + b)}) for a, b in some]
        (folder / f"sums_{name}.jsonl").write_text("\n".join(rows) + "\n")


def closeness(completions, answer, **columns):
    """1 for the sum and nothing else. Below that: 0.1 for a number, 0.2 if nothing follows it, up to 0.4 if it is near.

    A reward of 0 and 1 alone would teach a model little that is right one time in six.
    """
    return [graded(text.strip(), gold) for text, gold in zip(completions, answer, strict=True)]


def graded(text: str, gold: str) -> float:
    if text == gold:
        return 1.0
    first = re.search(r"\d{1,6}", text)
    if first is None:
        return 0.0
    near = max(0.0, 1 - abs(int(first[0]) - int(gold)) / 10)
    return 0.1 + 0.2 * (text == first[0]) + 0.4 * near


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    write(Path(sys.argv[1]))
