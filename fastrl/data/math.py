"""Competition mathematics: MATH to train on, and the sets that reasoning models are commonly evaluated on."""

import ast
import re

from fastrl.data.named import NamedDataset

SCIENTIFIC = re.compile(r"(-?\d+(?:\.\d+)?)[eE]([+-]?\d+)")


def power_of_ten(row: dict) -> dict:
    """A gold such as 4.5e33 written as a product: graders read the e as Euler's number."""
    gold = row.get("answer")
    found = SCIENTIFIC.fullmatch(gold.strip()) if isinstance(gold, str) else None
    return row | {"answer": f"{found[1]} \\times 10^{{{int(found[2])}}}"} if found else row


def list_of_answers(row: dict) -> dict:
    """final_answer, a list or its text, as one gold: several are set apart by commas, as in a box."""
    golds = row.get("final_answer")
    if isinstance(golds, str):
        try:
            golds = ast.literal_eval(golds)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            golds = [golds]
    if not isinstance(golds, list) or not all(isinstance(gold, str | int | float) for gold in golds):
        return row
    bare = [str(gold).strip().removeprefix("$").removesuffix("$") for gold in golds]
    return row | {"answer": ", ".join(bare)}


MATH = NamedDataset(
    name="math",
    repo="DigitalLearningGmbH/MATH-lighteval",
    revision="0530c78699ea5e8eb5530600900e1f328b48acad",
    splits={"train": "train", "test": "test"},
    files={"train": "math/train.jsonl"},
)
MATH500 = NamedDataset(
    name="math500",
    repo="HuggingFaceH4/MATH-500",
    revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
    splits={"test": "test"},
    files={"test": "math500/test.jsonl"},
)
AIME24 = NamedDataset(
    name="aime24",
    repo="HuggingFaceH4/aime_2024",
    revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
    splits={"test": "train"},
    files={"test": "aime24/test.jsonl"},
)
AMC23 = NamedDataset(
    name="amc23",
    repo="math-ai/amc23",
    revision="80815d37005feb82cd7f8fbc6901d5d3eff43057",
    splits={"test": "test"},
    files={"test": "amc23/test.jsonl"},
)
MINERVA = NamedDataset(
    name="minerva",
    repo="math-ai/minervamath",
    revision="ee46ddc498933b1977577953250ca5c66be64f96",
    splits={"test": "test"},
    files={"test": "minerva/test.jsonl"},
    rewrite=power_of_ten,
)
OLYMPIADBENCH = NamedDataset(
    name="olympiadbench",
    repo="math-ai/olympiadbench",
    revision="4faaf1e6ec17d11a4218a9bf4c049ecaf954dd84",
    splits={"test": "test"},
    files={"test": "olympiadbench/test.jsonl"},
    rewrite=list_of_answers,
)
HMMT = NamedDataset(
    name="hmmt", repo="MathArena/hmmt_feb_2024", splits={"test": "train"}, files={"test": "hmmt_feb_2024/test.jsonl"}
)
