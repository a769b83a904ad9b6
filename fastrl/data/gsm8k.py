"""GSM8K: grade-school word problems with integer answers."""

from fastrl.data.named import NamedDataset

GSM8K = NamedDataset(
    name="gsm8k",
    repo="openai/gsm8k",
    revision="740312add88f781978c0658806c59bc2815b9866",
    config="main",
    splits={"train": "train", "test": "test"},
    files={"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"},
)
