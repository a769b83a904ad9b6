"""A model whose distribution is not computed is refused by every program that samples, before it samples."""

import pytest

from support.families import make_folder
from support.programs import Run


@pytest.mark.parametrize(
    "program, flags",
    [("train", ["--steps", 1]), ("evaluate", ["--k", 1]), ("profile", ["--num-completions", 2, "--out", "p.jsonl"])],
)
def test_a_program_refuses_a_head_that_is_not_known(program, flags, tmp_path):
    make_folder(tmp_path / "model", "inkling_text", options=False)
    run = Run(tmp_path, "--model", "model", "--data", "arithmetic", "--limit", 40, *flags, module=f"fastrl.{program}")
    assert run.wait() == 2, run.text
    line = run.text.strip().splitlines()[-1]
    assert "InklingForCausalLM has other log-probabilities in what it does to its logits" in line
    assert "docs/models.md" in line and "Traceback" not in run.text
