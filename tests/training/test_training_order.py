"""The order of the images: complete epochs, any starting step, any split of the batch."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkern.training.data.order import StreamBatches, epoch_order


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 40),
    micro=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    world=st.integers(1, 3),
    start=st.integers(0, 9),
)
def test_every_split_and_every_start_see_the_same_stream(length, micro, accumulation, world, start):
    batch, steps = micro * accumulation * world, 4
    whole = list(islice(StreamBatches(length, batch, 7), start + steps))
    for step in range(start, start + steps):
        rebuilt = [None] * batch
        for rank in range(world):
            order = StreamBatches(
                length, batch, 7, start_step=step, accumulation=accumulation, rank=rank, world_size=world
            )
            for j, indices in enumerate(islice(order, accumulation)):
                rebuilt[order.offset(j) : order.offset(j) + micro] = indices
        assert rebuilt == whole[step]
    stream = np.concatenate(whole)
    for epoch in range(len(stream) // length):
        assert sorted(stream[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_epochs_and_seeds_differ_and_repeat():
    assert np.array_equal(epoch_order(50, 2**64 - 1, 3), epoch_order(50, 2**64 - 1, 3))
    assert not np.array_equal(epoch_order(50, 1, 3), epoch_order(50, 1, 4))
    assert not np.array_equal(epoch_order(50, 1, 3), epoch_order(50, 2, 3))


def test_batch_size_must_divide():
    with pytest.raises(ValueError, match="batch_size=10 must be a multiple of processes · accumulation = 2 · 3"):
        StreamBatches(5, 10, 0, accumulation=3, world_size=2)
