"""Packing by hand: which tokens are there once, and where they stand in their rows."""

import torch

from fastrl.models.packing import pack
from fastrl.step.batching import make_batch, select
from support.batches import completion, group, numbered

GROUPS = [
    group([1, 2, 3], completion([4, 5]), completion([6]), completion([7, 8, 9])),
    group([10], completion([11, 12]), completion([13, 14])),
]


def batch_of(groups):
    return make_batch(groups, lambda rewards, problem: rewards, pad_id=15, max_new_tokens=4)


def test_packing_by_hand():
    packing = pack(batch_of(GROUPS))
    # prompts once; the last token of each row predicts nothing
    assert packing.input_ids.tolist() == [[1, 2, 3, 4, 7, 8, 10, 11, 13]]
    assert packing.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1, 1]]
    real = [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 4, 5], [6, 7], [6, 8]]
    assert [row[: len(want)] for row, want in zip(packing.place.tolist(), real, strict=True)] == real
    assert packing.home.tolist() == [0, 1, 2, 3, 13, 14, 15, 16, 21]  # row * 5 + column
    assert packing.place.flatten()[packing.home].tolist() == list(range(9))


def test_any_rows_in_any_order_are_packed_alone():
    batch = select(batch_of(GROUPS), torch.tensor([4, 2, 1]))
    packing = pack(batch)
    # the two rows of the first group share its prompt, which now stands in the second row
    assert packing.input_ids.tolist() == [[10, 13, 1, 2, 3, 7, 8]]
    assert packing.place[2, :3].tolist() == packing.place[1, :3].tolist() == [2, 3, 4]


def test_every_real_token_is_in_its_place():
    batch = numbered([9, 2, 4, 1, 6, 3], [2, 0, 2, 0, 5, 5])
    packing = pack(batch)
    inputs = batch.lengths() - 1
    assert packing.input_ids.numel() == int((inputs - batch.prompt_lengths).clamp(min=0).sum()) + 3
    for b, n in enumerate(inputs.tolist()):
        places = packing.place[b, :n]
        assert packing.position_ids[0, places].tolist() == list(range(n))
        assert packing.input_ids[0, places[1:]].tolist() == batch.input_ids[b, 1:n].tolist()


def test_rows_by_hand():
    packing = pack(batch_of(GROUPS))
    assert packing.rows.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 4, 5, 6, 7, 6, 8]
    assert packing.row_starts.tolist() == [0, 4, 7, 12, 14, 16]
    assert packing.rows[packing.row_home].tolist() == list(range(9))
