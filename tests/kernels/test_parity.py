"""The check of the Triton head before a run: silent where it works, and in words where it does not."""

import json
import subprocess
import sys

import pytest
import torch

from fastrl.base.log import RunLog
from fastrl.kernels import parity, rows
from fastrl.models.loading import load_model
from fastrl.run.models import head_kernels
from support.device import COMPILED, DEVICE


def small(monkeypatch):
    """Few rows in the interpreter, with the same number of blocks and slabs."""
    if not COMPILED:
        monkeypatch.setattr(parity, "NUM_ROWS", 48)
        for name, value in (("BLOCK_V", 256), ("SLAB_WORDS", 512), ("SLAB_ELEMENTS", 48 * 512)):
            monkeypatch.setattr(rows, name, value)


@pytest.fixture
def weight(monkeypatch):
    small(monkeypatch)
    return torch.randn(700, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def test_what_is_carried_between_slabs_is_checked(weight, monkeypatch):
    forward = rows.row_forward

    def forgetful(*given, first_word, **options):
        forward(*given, first_word=0, **options)

    monkeypatch.setattr(rows, "row_forward", forgetful)
    assert parity.head_fault(weight).startswith("logprobs off by")
    assert parity.NUM_ROWS * min(len(weight), parity.NUM_WORDS) > rows.SLAB_ELEMENTS


def test_on_a_gpu_the_check_takes_more_than_one_slab():
    assert parity.NUM_ROWS * parity.NUM_WORDS > rows.SLAB_ELEMENTS and parity.NUM_ROWS <= rows.SLAB_ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_said_where_it_works(weight, dtype):
    assert parity.head_fault(weight.to(dtype)) == ""


def test_a_wrong_number_is_found(weight, monkeypatch):
    forward, gradient, add = rows.row_forward, rows.row_gradient, rows.add_weight_gradient

    def off(z, target, scale, logprobs, *given, finish, **state):
        forward(z, target, scale, logprobs, *given, finish=finish, **state)
        if finish:
            logprobs += 0.01

    monkeypatch.setattr(rows, "row_forward", off)
    assert parity.head_fault(weight) == "logprobs off by 0.01 nats"
    monkeypatch.setattr(rows, "row_forward", forward)
    monkeypatch.setattr(rows, "row_gradient", lambda *a, **k: gradient(*a, **k).mul_(1.1))
    assert parity.head_fault(weight) == "hidden gradient off by 0.1 of its norm"
    monkeypatch.setattr(rows, "row_gradient", gradient)
    monkeypatch.setattr(rows, "add_weight_gradient", lambda into, dz, hidden: add(into, 2 * dz, hidden))
    assert parity.head_fault(weight).startswith("weight gradient off by 1")
    monkeypatch.setattr(rows, "add_weight_gradient", lambda into, dz, hidden: into.fill_(float("nan")))
    assert parity.head_fault(weight) == "weight gradient off by nan of its norm"


def test_a_run_on_a_gpu_says_which_head_it_has(monkeypatch, capsys, tmp_path):
    """As on a GPU: only the name of the device is one."""
    small(monkeypatch)
    loaded, log = load_model("embedded", dtype=torch.float32, device=DEVICE), RunLog(tmp_path, total_steps=1)
    loaded.model.lm_head.weight.data = loaded.model.lm_head.weight.data.clone()  # mapped files start anywhere
    assert head_kernels(loaded, "cuda:0", log)
    assert "kernels: the head runs on Triton" in capsys.readouterr().out
    monkeypatch.setattr(rows, "row_gradient", lambda *given, **how: given[0].zero_())
    assert not head_kernels(loaded, "cuda:0", log)
    said = capsys.readouterr().out
    assert "WARNING: the head runs in torch" in said and "hidden gradient off by 1 of its norm" in said
    assert not head_kernels(loaded, "cpu", log) and not capsys.readouterr().out


def test_a_kernel_that_does_not_compile_is_no_crash(weight, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no such instruction\nand more lines")

    monkeypatch.setattr(rows, "row_forward", broken)
    assert parity.head_fault(weight) == "RuntimeError: no such instruction"


def test_where_there_is_no_triton_every_operation_runs_in_torch():
    program = """
import json, sys
sys.modules["triton"] = None
import torch
from fastrl.kernels.apo_loss import apo_loss
from fastrl.kernels.linear_logprob import linear_logprob
from fastrl.kernels.linear_policy_loss import TokenVectors, linear_policy_loss
from fastrl.kernels.policy_loss import TokenLoss, policy_loss
from fastrl.weights.moves import extrapolate_, interpolate_

hidden, weight, target, one = torch.ones(2, 4), torch.eye(4), torch.tensor([1, 3]), torch.ones(2)
rows, mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
print(json.dumps([
    linear_logprob(hidden, weight, target)[0].sum().item(),
    linear_policy_loss(TokenLoss(), hidden, weight, target, TokenVectors(one, one)).loss.item(),
    policy_loss(TokenLoss(), one, one, one, one).loss.item(), apo_loss(rows, 0 * rows, mask, one[:1], 1.0).u.item(),
    interpolate_(one.clone(), 0 * one, 0.5).named()["after_sq"],
    extrapolate_(one.clone(), 0 * one, 4, 1.0, grads=(one, one)).named()["scale"],
]))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    # four equal logits: twice log 1/4; on-policy with A = 1: -1 a token; u = 2; two halves; S_4(1) / S_2(1) = 2 each
    log16 = 2.772589
    assert json.loads(ran.stdout) == pytest.approx([-log16, -2.0, -2.0, 2.0, 0.5, 4.0])
