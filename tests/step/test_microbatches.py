"""Memory that runs out within a minibatch: the run goes on with smaller microbatches and the same gradient."""

import json

import pytest
import torch

from fastrl.step.microbatches import Fitting
from support.cases import mostly_later
from support.programs import together
from support.short_trainings import FLOAT64_STEPS, limited_steps
from support.trainers import make_trainer

SETTINGS = {
    "grpo": ["--kl", "0.05", "--minibatches", 2, "--update.epochs-per-batch", 2],
    "ppo": ["--objective", "ppo", "--critic.optim.lr", "1e-3", "--minibatches", 2],
    "rebel": ["--objective", "rebel", "--update.epochs-per-batch", 2],
}


@pytest.mark.parametrize(
    "name, where",
    mostly_later(
        [(name, where) for name in SETTINGS for where in ("forward", "backward")],
        ("grpo", "backward"),
        ("rebel", "forward"),
    ),
)
def test_a_run_out_of_memory_equals_one_with_small_microbatches(name, where, tmp_path, float64_norms, capsys):
    flags = [*SETTINGS[name], "--tokens-per-microbatch"]
    calm, expected = limited_steps(tmp_path / "calm", *flags, 64)
    failed, actual = limited_steps(tmp_path / "failed", *flags, 512, limits=[("policy", 60, where)])
    limit = failed.learner.fitting.tokens
    assert limit < 512 and calm.learner.fitting.tokens == 64
    assert f"going on with --tokens-per-microbatch {limit}" in capsys.readouterr().out
    for one, other in zip(actual, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-12, rel=1e-9, nan_ok=True)
        assert one["grad_norm"] > 0
    assert (failed.learner.policy.flat.weights - calm.learner.policy.flat.weights).abs().max() < 1e-12
    # bit for bit what a run does that had the limit from the start
    same, again = limited_steps(tmp_path / "same", *flags, limit)
    if where == "forward":
        assert again[1] == actual[1] or name == "rebel"
    assert again[1] == pytest.approx(actual[1], abs=1e-12, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("model", ["reference", "critic"])
def test_scores_and_critic_too(model, tmp_path, float64_norms):
    flags = ["--objective", "ppo", "--kl", "0.05", "--critic.optim.lr", "1e-3", "--tokens-per-microbatch"]
    calm, expected = limited_steps(tmp_path / "calm", *flags, 64)
    where = "backward" if model == "critic" else "forward"
    failed, actual = limited_steps(tmp_path / "failed", *flags, 512, limits=[(model, 100, where)])
    assert failed.learner.fitting.tokens <= 256
    for one, other in zip(actual, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-12, rel=1e-9, nan_ok=True)
    assert (failed.learner.critic.flat.weights - calm.learner.critic.flat.weights).abs().max() < 1e-12


def test_a_sequence_that_does_not_fit_alone_ends_the_run(tmp_path):
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        limited_steps(tmp_path, "--tokens-per-microbatch", 64, limits=[("policy", 3, "forward")])


def test_memory_that_a_library_ran_out_of_is_memory_too():
    """Errors of cuBLAS and of CUDA's runtime are plain RuntimeErrors."""
    said: list[str] = []
    released: list[int] = []
    fitting = Fitting(tokens=64, say=said.append, release=lambda: released.append(fitting.tokens))

    def work(error):
        fitting.whole = False
        if fitting.tokens > 16:
            raise error
        return fitting.tokens

    assert fitting.run(lambda: work(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"))) == 16
    assert ["--tokens-per-microbatch 32" in said[0], "--tokens-per-microbatch 16" in said[1]] == [True, True]
    assert released == [32, 16]
    fitting.tokens = 64
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fitting.run(lambda: work(RuntimeError("CUDA error: an illegal memory access was encountered")))
    assert fitting.tokens == 64


def test_without_a_microbatch_there_is_nothing_to_cut():
    fitting = Fitting(tokens=64, say=print)

    def work():
        raise torch.OutOfMemoryError("gradients")

    with pytest.raises(torch.OutOfMemoryError, match="gradients"):
        fitting.run(work)
    assert fitting.tokens == 64


def test_the_limit_is_kept_by_a_checkpoint_unless_it_was_set_anew(tmp_path):
    trainer = make_trainer(tmp_path / "one", *FLOAT64_STEPS, "--tokens-per-microbatch", 512)
    trainer.learner.fitting.tokens = 128
    state, tensors = json.loads(json.dumps(trainer.state_dict())), dict(trainer.learner.state_tensors())
    for configured, kept in ((512, 128), (300, 300)):
        other = make_trainer(tmp_path / str(configured), *FLOAT64_STEPS, "--tokens-per-microbatch", configured)
        other.load_state_dict(state, tensors)
        assert other.learner.fitting.tokens == kept


RANKS = """
import torch
from pathlib import Path
from support.short_trainings import limited_steps
from fastrl.base import ranks
ranks.start("cpu")
limits = [("policy", 60, "backward")] if ranks.rank() == 1 else []
trainer, metrics = limited_steps(Path({folder!r}) / str(ranks.rank()), "--tokens-per-microbatch", 512, limits=limits)
calm, expected = limited_steps(Path({folder!r}) / f"calm{{ranks.rank()}}", "--tokens-per-microbatch", 512)
weights, expected_weights = trainer.learner.policy.flat.weights, calm.learner.policy.flat.weights
torch.save([trainer.learner.fitting.tokens, (weights - expected_weights).abs().max().item(),
            [m["grad_norm"] for m in metrics], [m["grad_norm"] for m in expected]],
           Path({folder!r}) / f"{{ranks.rank()}}.pt")
ranks.barrier()
ranks.stop()
ranks.leave(0)
"""


@pytest.mark.slow
def test_ranks_stay_in_step_when_one_of_them_runs_out(tmp_path):
    said = together(tmp_path, RANKS.format(folder=str(tmp_path)))
    assert "rank 1: warning: out of memory" in said
    for rank, limited in ((0, False), (1, True)):
        tokens, difference, got, expected = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert (tokens < 512) == limited
        assert difference < 1e-6 and got == pytest.approx(expected, rel=1e-5)
