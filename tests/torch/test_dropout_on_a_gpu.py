"""Dropout as a GPU has it, drawn for every pack. All of it works on a processor too."""

from __future__ import annotations

import torch

from heldout.train.dropout import DrawnOnGpu, Dropout

LARGEST = 3 << 20


def masks(*steps: tuple[int, int]) -> torch.Tensor:
    """The mask of one place at the last of these (step, pack), by a process that has seen the others."""
    drawn = DrawnOnGpu(0.2, seed=3, like=torch.zeros(1))
    for step, number in steps:
        drawn.start(step, LARGEST)
        drawn.next_pack(number)
    mask = drawn.mask(5, 300, 64, torch.zeros(1))
    assert mask is not None
    return mask.clone()


def test_a_mask_depends_on_its_step_pack_and_place_and_on_nothing_that_came_before() -> None:
    assert torch.equal(masks((9, 1)), masks((1, 0), (8, 0), (9, 0), (9, 1)))
    for other in (masks((9, 0)), masks((8, 1))):
        assert (masks((9, 1)) != other).float().mean() > 0.2


def test_masks_stay_at_one_address_and_drop_as_often_as_they_should() -> None:
    drawn = DrawnOnGpu(0.2, seed=3, like=torch.zeros(1))
    drawn.start(1, LARGEST)
    address = drawn.address
    for step in (1, 2, 3):
        drawn.start(step, LARGEST)
        drawn.next_pack(0)
        assert drawn.address == address
    mask = drawn.mask(0, 1000, 64, torch.zeros(1))
    assert mask is not None
    assert abs(float((mask == 0).float().mean()) - 0.2) < 0.01
    assert abs(float(mask.mean()) - 1) < 0.02
    drawn.stop()
    assert drawn.mask(0, 1000, 64, torch.zeros(1)) is None


def test_frozen_masks_stay_those_of_their_place_whatever_step_comes_next() -> None:
    plain = Dropout(0.2, seed=3)
    plain.start(1, LARGEST)
    frozen, like = plain.frozen(), torch.zeros(1)
    before = frozen.mask(5, 300, 64, like)
    plain.start(2, LARGEST)
    plain.next_pack(1)
    after, other = frozen.mask(5, 300, 64, like), plain.mask(5, 300, 64, like)
    assert before is not None
    assert after is not None
    assert other is not None
    assert torch.equal(before, after)
    assert not torch.equal(before, other)
