"""Padded batches by hand, and every way of cutting them: each row once, within the budget, same denominators."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.base.types import Completion
from fastrl.step.batching import averages, cut, denominator, make_batch, minibatches, select
from support.batches import completion, group, numbered

PAD = 99


def by_hand():
    return [
        group([1, 2, 3], completion([4, 5], 1.0), completion([6], 0.5)),
        group([7], completion([8, 9, 10, 11], 0.25, "length"), completion([12, 13], -2.0), completion([99, 14], 3.0)),
    ]


def contents(batch):
    """Per row: its real tokens and everything that belongs to it, padding left out."""
    rows = []
    for b, n in enumerate(batch.lengths().tolist()):
        rows.append(
            (
                batch.input_ids[b, :n].tolist(),
                batch.response_mask[b, :n].tolist(),
                batch.rollout_logprobs[b, :n].tolist(),
                batch.ref_logprobs[b, :n].tolist(),
                batch.group[b].item(),
                batch.reward[b].item(),
                batch.credit[b].item(),
                batch.truncated[b].item(),
            )
        )
    return rows


def frozen(batch):
    return {f.name: v.clone() if isinstance(v := getattr(batch, f.name), torch.Tensor) else v for f in fields(batch)}


def assert_unchanged(batch, before):
    for name, value in before.items():
        now = getattr(batch, name)
        if isinstance(value, torch.Tensor):
            assert now.dtype == value.dtype and torch.equal(now.nan_to_num(7.5), value.nan_to_num(7.5)), name
        else:
            assert now == value, name


def test_make_batch_by_hand():
    asked = []

    def credit(rewards, problem):
        asked.append((problem.id, rewards.tolist()))
        return rewards * 10 + len(rewards)

    batch = make_batch(by_hand(), credit, pad_id=PAD, max_new_tokens=4)
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 4, 5],
        [1, 2, 3, 6, PAD],
        [7, 8, 9, 10, 11],
        [7, 12, 13, PAD, PAD],
        [7, 99, 14, PAD, PAD],  # a generated token may be the pad token
    ]
    assert batch.attention_mask.int().tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
    ]
    assert batch.response_mask.int().tolist() == [
        [0, 0, 0, 1, 1],
        [0, 0, 0, 1, 0],
        [0, 1, 1, 1, 1],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 0, 0],
    ]
    # label-aligned: -id / 8 stands in the column of the id
    expected = torch.where(batch.response_mask, -batch.input_ids / 8, 0.0)
    assert torch.equal(batch.rollout_logprobs, expected)
    assert batch.group.tolist() == [0, 0, 1, 1, 1]
    assert batch.reward.tolist() == [1.0, 0.5, 0.25, -2.0, 3.0]
    assert asked == [("p1", [1.0, 0.5]), ("p7", [0.25, -2.0, 3.0])]
    assert batch.credit.tolist() == [12.0, 7.0, 5.5, -17.0, 33.0]
    assert batch.truncated.tolist() == [False, False, True, False, False]
    assert batch.max_new_tokens == 4 and batch.lengths().tolist() == [5, 4, 5, 3, 3] and len(batch) == 5
    assert batch.old_logprobs is None and batch.ref_logprobs is None
    types = {n: getattr(batch, n).dtype for n in ("input_ids", "group", "response_mask", "truncated", "credit")}
    assert list(types.values()) == [torch.int64, torch.int64, torch.bool, torch.bool, torch.float32]


def test_no_groups_make_an_empty_batch():
    batch = make_batch([], lambda rewards, problem: rewards, pad_id=PAD, max_new_tokens=4)
    assert len(batch) == 0 and batch.input_ids.dtype == torch.int64
    assert list(cut(batch, 100)) == [] and [len(part) for part in minibatches(batch, 2)] == [0, 0]
    assert denominator(batch, "token") == denominator(batch, "group") == 1.0


def test_select_trims_to_its_longest_row():
    batch = numbered([5, 2, 3, 1], [0, 0, 1, 1])
    before = frozen(batch)
    part = select(batch, torch.tensor([2, 1]))
    assert part.input_ids.tolist() == [[3, 3, 3], [2, 2, 0]]
    assert part.ref_logprobs.shape == part.rollout_logprobs.shape == (2, 3)
    assert part.old_logprobs is None and part.max_new_tokens == 50
    assert contents(part) == [contents(batch)[2], contents(batch)[1]]
    part.credit.zero_()
    part.response_mask.zero_()
    assert_unchanged(batch, before)


def test_cut_by_hand():
    batch = numbered([3, 8, 4, 2, 8, 3], [0, 0, 0, 1, 1, 1])
    # longest first 8 8 | 4 3 3 2: 3 rows of 8 are 24 > 16, 4 rows of 4 are 16
    pieces = list(cut(batch, 16))
    assert [rows.tolist() for rows, _ in pieces] == [[1, 4], [2, 0, 5, 3]]
    assert [tuple(part.input_ids.shape) for _, part in pieces] == [(2, 8), (4, 4)]
    # whole groups of longest 8: 24 tokens each, over the limit alone, together 48
    assert [rows.tolist() for rows, _ in cut(batch, 16, splits_groups=False)] == [[1, 2, 0], [4, 5, 3]]
    assert [rows.tolist() for rows, _ in cut(batch, 47, splits_groups=False)] == [[1, 2, 0], [4, 5, 3]]
    assert [rows.tolist() for rows, _ in cut(batch, 48, splits_groups=False)] == [[1, 2, 0, 4, 5, 3]]


def test_cut_packed_by_hand():
    batch = numbered([3, 8, 4, 2, 8, 3], [0, 0, 0, 1, 1, 1])

    def pieces(tokens, **options):
        return [rows.tolist() for rows, _ in cut(batch, tokens, packed=True, **options)]

    # groups stay together; a prompt of 1 counts once: 1 + 7 + 3 + 2 = 13 tokens, then 1 + 7 + 2 + 1 = 11
    assert pieces(24) == [[1, 2, 0, 4, 5, 3]]
    assert pieces(23) == [[1, 2, 0, 4, 5], [3]]  # the last row alone again needs its prompt
    assert pieces(13) == pieces(20) == [[1, 2, 0], [4, 5, 3]]
    assert pieces(12) == [[1, 2], [0, 4], [5, 3]]  # 11, then 3 + 8 and 3 + 1, each with its prompt again
    assert pieces(1) == [[1], [2], [0], [4], [5], [3]]
    assert pieces(12, splits_groups=False) == [[1, 2, 0], [4, 5, 3]]
    # one row of 80 beside rows of 2: distinct 80 + 9 = 89, but attention sees 10 x 80 = 800 > 4 x 100
    long = numbered([80] + [2] * 9, [0] * 10)
    assert [len(rows) for rows, _ in cut(long, 100, packed=True)] == [5, 5]
    assert [len(rows) for rows, _ in cut(long, 200, packed=True)] == [10]


sizes = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(sizes=sizes, tokens=st.integers(1, 80), whole=st.booleans())
def test_cut_is_a_partition_within_the_budget(sizes, tokens, whole):
    lengths = [n for group in sizes for n in group]
    batch = numbered(lengths, [g for g, group in enumerate(sizes) for _ in group])
    before, rows_of_batch = frozen(batch), contents(batch)
    seen, groups_seen = [], []
    for rows, part in cut(batch, tokens, splits_groups=not whole):
        assert contents(part) == [rows_of_batch[row] for row in rows.tolist()]
        assert part.input_ids.shape[1] == max(lengths[row] for row in rows.tolist())  # trimmed
        units = set(part.group.tolist()) if whole else rows.tolist()
        assert part.input_ids.numel() <= tokens or len(units) == 1
        seen += rows.tolist()
        groups_seen += sorted(set(part.group.tolist()))
    assert sorted(seen) == list(range(len(lengths)))
    if whole:
        assert sorted(groups_seen) == list(range(len(sizes)))  # no group in two pieces
    assert_unchanged(batch, before)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(sizes=sizes, count=st.integers(1, 9))
def test_minibatches_are_whole_groups_and_the_union(sizes, count):
    lengths = [n for group in sizes for n in group]
    batch = numbered(lengths, [3 * g + 1 for g, group in enumerate(sizes) for _ in group])  # numbers may have gaps
    before, rows_of_batch = frozen(batch), contents(batch)
    parts = minibatches(batch, count)
    assert len(parts) == count
    assert [row for part in parts for row in contents(part)] == rows_of_batch
    held = [len(set(part.group.tolist())) for part in parts]
    assert sum(held) == len(sizes) and max(held) - min(held) <= 1
    if count <= len(sizes):
        assert min(held) >= 1
    for normalizer in ("token", "completion", "group"):  # each part's own; nothing is lost between them
        sums = sum(denominator(p, normalizer) for p in parts if p.response_mask.any())
        assert sums == denominator(batch, normalizer) or not batch.response_mask.any()
    assert_unchanged(batch, before)


def test_denominators_by_hand():
    batch = numbered([4, 3, 2, 5, 6], [0, 0, 1, 1, 2])  # one token of each is the prompt
    assert [denominator(batch, n) for n in ("token", "completion", "group")] == [15.0, 5.0, 3.0]
    batch.response_mask[1] = False  # a masked row counts neither its tokens nor itself
    batch.response_mask[4] = False  # nor does its group when no other row is left
    before = frozen(batch)
    assert [denominator(batch, n) for n in ("token", "completion", "group")] == [8.0, 3.0, 2.0]
    assert_unchanged(batch, before)
    batch.response_mask[:] = False
    assert [denominator(batch, n) for n in ("token", "completion", "group")] == [1.0, 1.0, 1.0]  # never 0/0
    with pytest.raises(ValueError, match="normalizer must be token, completion or group, got 'sequence'"):
        denominator(batch, "sequence")


def test_logprobs_and_ids_must_be_as_many():
    with pytest.raises(ValueError, match="2 token_ids but 1 rollout_logprobs"):
        Completion(token_ids=[1, 2], rollout_logprobs=[-0.5], finish_reason="stop")


@pytest.mark.parametrize("broken", [None, math.nan, math.inf, -math.inf])
def test_no_step_is_taken_on_tokens_that_the_engine_gave_no_number_for(broken):
    groups = by_hand()
    groups[1].completions[0].rollout_logprobs[2] = broken
    batch = make_batch(groups, lambda rewards, _: rewards, pad_id=PAD, max_new_tokens=4)
    assert batch.credit.isnan().tolist() == [False, False, True, False, False]
    assert batch.credit[[0, 1, 3, 4]].tolist() == [1.0, 0.5, -2.0, 3.0]
    found = batch.rollout_logprobs[2, 3]
    assert found == broken if broken in (math.inf, -math.inf) else found.isnan()


def test_sums_of_nothing_are_an_empty_dict():
    assert averages({}, 3.0) == {}
