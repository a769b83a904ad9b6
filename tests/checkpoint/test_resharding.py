"""Checkpoints of other numbers of ranks: cut anew where that is exact, refused where it is not; ranks that agree."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrl import checkpoint
from fastrl.base.types import CheckpointError
from fastrl.checkpoint.resharding import reslice
from support import programs
from support.cases import mostly_later
from support.run_folders import rows, sign_again

SMALL = """
    --problems-per-step 8 --group-size 4 --limit 30 --eval-limit 2 --eval-k 1 --rollouts-every 1
    --sample-every 0 --threads 1 --reward last_character
""".split()


def shards(folder, *tensors: dict[str, torch.Tensor]) -> list:
    files = [folder / f"optim-rank{rank}.safetensors" for rank in range(len(tensors))]
    for file, own in zip(files, tensors, strict=True):
        save_file(own, file)
    return files


def test_two_shards_become_one_and_four_by_hand(tmp_path):
    values = torch.arange(1.0, 4097)
    values[3000:] = 0  # the end of the buffer, of two ranks
    step = torch.tensor(7.0)
    halves = [{"master": part, "optimizer.step": step} for part in values.chunk(2)]
    files = shards(tmp_path, *halves)
    whole = reslice(files, {"": 3072}, 0, 1, "cpu")
    assert torch.equal(whole["master"], values[:3072]) and whole["optimizer.step"] == 7
    # four ranks need a longer buffer, whose end is zeros
    parts = [reslice(files, {"": 1024}, rank, 4, "cpu")["master"] for rank in range(4)]
    assert torch.equal(torch.cat(parts), values)
    longer = [reslice(files, {"": 1536}, rank, 4, "cpu")["master"] for rank in range(4)]
    assert torch.equal(torch.cat(longer)[:4096], values) and not torch.cat(longer)[4096:].any()
    with pytest.raises(CheckpointError, match="master does not end in zeros"):
        reslice(files, {"": 2048}, 0, 1, "cpu")
    with pytest.raises(CheckpointError, match="has 4096 elements and this model 9000"):
        reslice(files, {"": 9000}, 0, 1, "cpu")


@pytest.mark.promise("A10", trials=2)
def test_eight_bit_state_is_refused(tmp_path):
    own = {"master": torch.ones(4096), "optimizer.state1": torch.ones(4096, dtype=torch.uint8)}
    for case in ({**own}, {"master": own["master"], "optimizer.absmax1": torch.ones(16)}):
        files = shards(tmp_path, case, case)
        with pytest.raises(
            CheckpointError, match=r"written by 2 ranks, and this run has 1: .* is 8-bit state, .*start 2"
        ):
            reslice(files, {"": 8192}, 0, 1, "cpu")


def test_counts_that_differ_between_ranks_are_refused(tmp_path):
    files = shards(tmp_path, *({"optimizer.step": torch.tensor([float(n)])} for n in (3, 4)))
    with pytest.raises(CheckpointError, match="optimizer.step differs between ranks"):
        reslice(files, {"": 1}, 0, 1, "cpu")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """settings -> the folder of a run of two ranks over 4 steps, with a checkpoint of step 3; each is made once."""
    made = {}

    def of(*args):
        if args not in made:
            made[args] = tmp_path_factory.mktemp("two")
            together(made[args], 2, "--steps", 4, "--save-every", 3, *args)
        return made[args] / "runs" / "default"

    return of


def together(folder, count: int, *args: object, code: int = 0, **environment: str) -> str:
    """A run of `count` ranks to its end -> what the first said."""
    started = programs.ranks(folder, count, *SMALL, *args, **environment)
    codes = [run.wait() for run in started]
    assert codes == [code] * count, "\n".join(run.text[-2000:] for run in started)
    return started[0].text


def prompts(folder, step: int) -> list[str]:
    lines = (folder / "rollouts" / f"step_{step:06}.jsonl").read_text().splitlines()
    return list(dict.fromkeys(json.loads(line)["prompt"] for line in lines))


PPO = ("--objective", "ppo", "--critic.optim.lr", "1e-3")
CASES = [(1, ()), (4, ()), (1, PPO), (4, PPO)]


@pytest.mark.slow
@pytest.mark.promise("A10")
@pytest.mark.parametrize("count, args", mostly_later(CASES), ids=["1", "4", "1 ppo", "4 ppo"])
def test_another_number_of_ranks_goes_on(count, args, two, tmp_path):
    expected, folder = two(*args), tmp_path / "runs" / "default"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(expected / "metrics.jsonl", folder)
    shutil.copytree(expected / "checkpoints" / "step-3", folder / "checkpoints" / "step-3")
    said = together(tmp_path, count, "--steps", 4, "--resume", "auto", *args)
    assert "resume: step 3 from" in said and f"written by 2 ranks, and this run has {count}" in said
    old, new = (next(row for row in rows(f) if row["step"] == 4 and "loss" in row) for f in (expected, folder))
    for name in ("loss", "grad_norm", "reward", "entropy", "learning_rate", "completions/mean_length"):
        assert new[name] == pytest.approx(old[name], abs=1e-5, rel=1e-4 if name == "grad_norm" else 1e-5), name
    assert (new["num_tokens"], new["num_rollouts"]) == (old["num_tokens"], old["num_rollouts"])
    # the first rank has every `count`th problem of the step
    one, other = prompts(expected, 4), prompts(folder, 4)
    assert len(one) == 4 and (one == other[::2] if count == 1 else one[::2] == other)


@pytest.mark.slow
@pytest.mark.promise("A6")
def test_ranks_agree_on_a_save_that_failed_on_one(tmp_path):
    said = together(tmp_path, 2, "--steps", 3, "--save-every", 1, FASTRL_FAULT="full@save.optim:rank1:2")
    assert said.count("warning: ") == 1 and "could not be written" in said
    folder = tmp_path / "runs" / "default" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-1", "step-3"]
    assert {p.name for p in (folder / "step-3").iterdir()} >= {"optim-rank0.safetensors", "optim-rank1.safetensors"}
    # a damaged file is one rank's to find, and both refuse it
    file = folder / "step-3" / "rng-rank1.json"
    file.write_text(file.read_text().replace("1", "2", 1))
    said = together(tmp_path, 2, "--steps", 3, "--resume", folder / "step-3", code=6)
    assert "rng-rank1.json has changed" in said


def test_a_single_process_refuses_two_ranks_without_sizes(tmp_path):
    path = checkpoint.save(
        tmp_path, 1, write_model=lambda p: None, tensors=[("master", torch.ones(4))], state={"step": 1}, keep=2
    )
    for kind, end in (("optim", "safetensors"), ("rng", "safetensors"), ("rng", "json")):
        shutil.copy(path / f"{kind}-rank0.{end}", path / f"{kind}-rank1.{end}")
    sign_again(path, ranks=2)
    with pytest.raises(CheckpointError, match="written by 2 ranks but this run has 1"):
        checkpoint.load(path)
    with checkpoint.generators_kept():
        _, tensors = checkpoint.load(path, {"": 8})
    assert torch.equal(tensors["master"], torch.ones(8))
    assert load_file(path / "optim-rank0.safetensors")["master"].numel() == 4
