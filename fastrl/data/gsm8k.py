"""GSM8K: grade-school word problems with integer answers."""

from fastrl.data.files import NamedDataset

GSM8K = NamedDataset(name="gsm8k", files={"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"})
