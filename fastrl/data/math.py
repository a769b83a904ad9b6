"""Competition mathematics: MATH to train on, and the sets that reasoning models are commonly evaluated on."""

from fastrl.data.files import NamedDataset

MATH = NamedDataset(name="math", files={"train": "math/train.jsonl"})
MATH500 = NamedDataset(name="math500", files={"test": "math500/test.jsonl"})
AIME24 = NamedDataset(name="aime24", files={"test": "aime24/test.jsonl"})
AMC23 = NamedDataset(name="amc23", files={"test": "amc23/test.jsonl"})
MINERVA = NamedDataset(name="minerva", files={"test": "minerva/test.jsonl"})
OLYMPIADBENCH = NamedDataset(name="olympiadbench", files={"test": "olympiadbench/test.jsonl"})
HMMT = NamedDataset(name="hmmt", files={"test": "hmmt_feb_2024/test.jsonl"})
