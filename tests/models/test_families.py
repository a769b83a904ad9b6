"""Every decoder family: fastrl's log-probabilities are the model's own, or the model is refused."""

import pytest
import torch
import transformers
from safetensors import safe_open

from fastrl.engine.base import Request, Sampling
from fastrl.engine.hf import HFEngine
from fastrl.models.loading import load_model, save_model
from support.families import DOC, FAMILIES, VARIANTS, measured, rows_of

DOCUMENTED = {row.family: row for row in rows_of(DOC.read_text())}
SAME_VERSION = f"With transformers {transformers.__version__}:" in DOC.read_text()


def off(folder: str, loaded) -> float:
    """Largest |difference| between what the engine says of the tokens it sampled and transformers' own model."""
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    prompts = [[5, 9, 4, 7, 8, 3, 6, 5, 9], [7, 3], [4, 4, 8, 5, 6]]
    engine = HFEngine.of(loaded, max_num_seqs=64)
    requests = [Request(prompt_ids=ids, seeds=[10 * i, 10 * i + 1]) for i, ids in enumerate(prompts)]
    largest = 0.0
    for prompt, completions in zip(prompts, engine.sample(requests, Sampling(max_new_tokens=8)), strict=True):
        for completion in completions:
            ids = torch.tensor([prompt + completion.token_ids])
            with torch.no_grad():
                logits = own(ids).logits[0, len(prompt) - 1 : -1, : loaded.num_tokens]
            logprobs = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
            difference = logprobs - torch.tensor(completion.rollout_logprobs)
            largest = max(largest, difference.abs().max().item())
    return largest


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_equal_or_refused(family, tmp_path):
    row = measured(family, tmp_path)
    if SAME_VERSION:
        assert row == DOCUMENTED[family], "make the table of docs/models.md anew: python tests/support/families.py"
    if row.result == "refused":
        return
    for variant in VARIANTS:
        folder = tmp_path / variant
        loaded = load_model(str(folder), dtype=torch.float32, device="cpu", attention=row.attention)
        assert off(str(folder), loaded) < 1e-3
        save_model(loaded, tmp_path / "saved")
        assert keys(tmp_path / "saved") == keys(folder)


def keys(folder) -> set[str]:
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


def test_the_table_has_every_family():
    assert list(DOCUMENTED) == FAMILIES
    assert sum(row.result == "equal" for row in DOCUMENTED.values()) >= 80
    assert {row.result for row in DOCUMENTED.values()} == {"equal", "refused"}
