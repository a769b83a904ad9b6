"""Sampling and scoring together: cut-off completions, columns for user functions, evaluation, the log's honesty."""

import json
import math

import pytest
import torch

from fastrl.base.log import RunLog, printable
from fastrl.step.metrics import sampling_mismatch
from fastrl.step.rollout import first_samples
from support.run_folders import rows, step_records
from support.trainers import make_trainer


def test_cut_off_completions_earn_nothing_unless_asked_for(tmp_path):
    (tmp_path / "one.py").write_text("def one(completions, **columns):\n    return [1.0] * len(completions)\n")
    # of 64 completions 24 to 56 are longer, with seeds 0 to 7
    limit = ["--max-new-tokens", 6, "--problems-per-step", 8, "--eval-limit", 4]
    reward = ["--reward", f"{tmp_path / 'one.py'}:one", *limit]
    for extra, expected in (([], 0.0), (["--grade-truncated"], 1.0)):
        trainer = make_trainer(tmp_path / "run", *reward, *extra)
        groups = trainer.rollout.run(trainer.allocator.take(64), 0)
        completions = [c for g in groups for c in g.completions]
        cut = [c for c in completions if c.finish_reason == "length"]
        ended = [c for c in completions if c.finish_reason == "stop"]
        assert len(cut) > 5 and len(ended) > 5
        assert {c.reward for c in cut} == {expected} and {c.reward for c in ended} == {1.0}
        assert trainer.rollout.statuses["truncated"] == (0 if extra else len(cut))


def test_a_user_function_sees_the_columns_of_its_rows(tmp_path):
    problems = [{"prompt": f"{a}+1=", "answer": str(a + 1), "level": a} for a in range(6)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    (tmp_path / "f.py").write_text(
        "def f(prompts, completions, answer, level):\n"
        "    assert all(int(a) == l + 1 and p.startswith(str(l)) for p, a, l in zip(prompts, answer, level))\n"
        "    return [l / 10 for l in level]\n"
    )
    trainer = make_trainer(
        tmp_path / "run",
        "--data",
        tmp_path / "p.jsonl",
        "--reward",
        f"{tmp_path / 'f.py'}:f",
        "--instruction",
        "",
        "--problems-per-step",
        6,
        "--eval-limit",
        4,
        "--grade-truncated",
    )
    for group in trainer.rollout.run(trainer.allocator.take(48), 0):
        assert {c.reward for c in group.completions} == {group.problem.columns["level"] / 10}


def test_a_problem_that_comes_twice_in_a_step_is_sampled_anew(tmp_path):
    trainer = make_trainer(tmp_path, "--limit", 3, "--problems-per-step", 4, "--eval-limit", 4)
    a, b, c = trainer.allocator.problems
    plan = [(a, 2), (b, 4), (a, 4), (c, 2), (a, 8)]
    assert first_samples(plan) == [0, 0, 2, 0, 6]
    groups = trainer.rollout.run(plan, step=0)
    # the numbers go on, so the groups of one problem together are its group of 14
    whole = trainer.rollout.run([(a, 14)], step=0)[0]
    together = [c.token_ids for k in (0, 2, 4) for c in groups[k].completions]
    assert together == [c.token_ids for c in whole.completions] and len(set(map(tuple, together))) > 4
    other = trainer.rollout.run(plan, step=1)
    assert [c.token_ids for g in other for c in g.completions] != [c.token_ids for g in groups for c in g.completions]


def test_evaluation_repeats_itself_and_training_is_not_disturbed_by_it(tmp_path):
    often = make_trainer(tmp_path / "a", "--problems-per-step", 4, "--eval-limit", 8, "--eval-every", 1, "--steps", 3)
    never = make_trainer(tmp_path / "b", "--problems-per-step", 4, "--eval-limit", 8, "--steps", 3)
    often.run()
    never.run()
    assert step_records(tmp_path / "a") == step_records(tmp_path / "b")
    first, second = [r for r in rows(tmp_path / "b") if "eval/arithmetic/avg@8" in r]
    assert first["step"] == 0 and second["step"] == 3
    _, again = often.rollout.evaluate(often.eval_sets[0].problems, 8, often.eval_sets[0].sampling)
    _, once = never.rollout.evaluate(never.eval_sets[0].problems, 8, never.eval_sets[0].sampling)
    assert torch.equal(again, once)


def test_engine_and_trainer_agree_and_disagreement_would_show(tmp_path):
    trainer = make_trainer(tmp_path, "--problems-per-step", 4, "--eval-limit", 4, "--temperature", 0.8)
    metrics = trainer.step()
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4 and metrics["sampling/mismatch_kl"] < 1e-8
    trainer.learner.policy.inv_temperature = 1.0  # the trainer forgets the temperature
    assert trainer.step()["sampling/sampling_logp_difference/mean"] > 0.02


@pytest.mark.parametrize("flags", [["--checkpoint-activations", "selective"], ["--checkpoint-activations", "full"]])
def test_checkpoints_change_nothing(flags, tmp_path):
    plain, saving = (
        make_trainer(tmp_path / name, "--problems-per-step", 4, "--eval-limit", 4, *flags)
        for name, flags in (("plain", []), ("saving", flags))
    )
    for _ in range(2):
        one, other = plain.step(), saving.step()
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5) and one["grad_norm"] > 0
        assert one["reward"] == other["reward"] and one["completions/mean_length"] == other["completions/mean_length"]
    assert (plain.learner.policy.flat.weights - saving.learner.policy.flat.weights).abs().max() < 1e-6


def test_mismatch_by_hand():
    # ratios 2 and 1/2: mean 1.25; k3 of ln 2 is 2 - 1 - ln 2, of -ln 2 it is 1/2 - 1 + ln 2; their mean is 1/4
    got = sampling_mismatch(torch.tensor([math.log(2), -math.log(2)]))
    assert got["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.25)
    assert got["sampling/importance_sampling_ratio/max"] == pytest.approx(2.0)
    assert got["sampling/sampling_logp_difference/mean"] == pytest.approx(math.log(2))
    assert got["sampling/mismatch_kl"] == pytest.approx(0.25)


@pytest.mark.promise("B10")
def test_a_nan_step_is_logged_as_nan_and_changes_nothing(tmp_path):
    trainer = make_trainer(tmp_path, "--problems-per-step", 4, "--eval-limit", 4, "--steps", 2)
    trainer.step()
    before = {name: tensor.clone() for name, tensor in trainer.learner.policy.state_tensors()}
    original = trainer.learner.objective.loss_sum
    object.__setattr__(
        trainer.learner.objective, "loss_sum", lambda *a: (original(*a)[0] * float("nan"), original(*a)[1])
    )
    metrics = trainer.step()
    assert math.isnan(metrics["loss"]) and math.isnan(metrics["grad_norm"])
    assert metrics["skipped"] == 1 and metrics["skipped_total"] == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.learner.policy.state_tensors())
    trainer.log.metrics(2, {"loss": metrics["loss"]})
    assert math.isnan(rows(tmp_path)[-1]["loss"])


def test_the_console_shows_control_characters_and_never_sends_them():
    assert printable("a\x1b[31mred\x07\n\ud800") == "a\\x1b[31mred\\x07\n\\ud800"


def test_rewinding_the_log_drops_later_rows(tmp_path):
    log = RunLog(tmp_path, total_steps=3)
    for step in (1, 2, 3):
        log.metrics(step, {"reward": step / 10})
    log.rewind(2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2] and log.previous_reward == 0.2


def test_memory_is_looked_at_when_a_phase_has_ended(tmp_path):
    trainer = make_trainer(tmp_path, "--problems-per-step", 4, "--eval-limit", 4)
    seen = []

    def watch(phase):
        seen.append((phase, trainer.learner.policy.flat.grads.untyped_storage().nbytes() > 0))
        return {f"memory/measured_mib/{phase}": 7.0}

    trainer.memory = watch
    metrics = trainer.step()
    assert seen == [("generate", False), ("train", True)]  # gradients have no memory in the first
    assert metrics["memory/measured_mib/generate"] == metrics["memory/measured_mib/train"] == 7.0
