"""The noise of drop-in classes: torch's numbers, the generator's state after, or a counter keyed by the generator."""

import pytest
import torch

from diffkern.integrations.draws import check_noise, noise_source, randn_like
from diffkern.ops import solver_step
from diffkern.solvers import step_program

ADD = step_program({"c_x": [1.0], "c_z": [1.0]}, [0])
FORMATS = [torch.contiguous_format, torch.channels_last]


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (40, 3, 64, 64)])
def test_randn_like_draws_as_torch_does(shape, dtype, memory_format):
    like = torch.empty(shape, dtype=dtype, memory_format=memory_format)
    mine, theirs = generator(3), generator(3)
    drawn = randn_like(like, mine)
    expected = torch.empty_like(like).normal_(generator=theirs)
    assert torch.equal(drawn, expected)
    assert drawn.stride() == expected.stride()
    assert torch.equal(mine.get_state(), theirs.get_state())


def test_without_a_generator_torch_s_default_one_draws():
    like = torch.empty(2, 3, 65, 65)
    torch.manual_seed(5)
    expected, after = torch.randn_like(like), torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(randn_like(like), expected)
    assert torch.rand(()) == after


def test_a_list_has_a_generator_for_each_sample():
    like = torch.empty(3, 2, 9, 9)
    drawn = randn_like(like, [generator(i) for i in range(3)])
    for i in range(3):
        assert torch.equal(drawn[i], torch.randn(1, 2, 9, 9, generator=generator(i))[0])
    assert randn_like(like[:0], []).shape == (0, 2, 9, 9)


@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_a_list_of_another_length_is_refused(noise):
    with pytest.raises(ValueError, match="generator is a list of 2; it must have one for each of 3 samples"):
        noise_source(noise, torch.empty(3, 2), [generator(0)] * 2)


def noisy(like, source):
    return solver_step(torch.zeros_like(like), like, ADD, 0, **source)


def test_philox_is_repeatable_and_new_at_every_step():
    like = torch.zeros(2, 3, 33, 33)
    one, other = generator(1), generator(1)
    first, second = (noisy(like, noise_source("philox", like, one)) for _ in range(2))
    assert torch.equal(noisy(like, noise_source("philox", like, other)), first)
    assert torch.equal(noisy(like, noise_source("philox", like, other)), second)
    both = torch.stack([first.flatten(), second.flatten()])
    assert both.corrcoef()[0, 1].abs() < 0.05
    assert (both.mean(1).abs() < 0.05).all()
    assert ((both.std(1) - 1).abs() < 0.05).all()


def test_philox_with_a_list_is_a_sample_s_own_noise_in_any_batch():
    like = torch.zeros(3, 2, 9, 9)
    batch = noisy(like, noise_source("philox", like, [generator(i) for i in range(3)]))
    for i in range(3):
        alone = noisy(like[:1], noise_source("philox", like[:1], [generator(i)]))
        assert torch.equal(batch[i : i + 1], alone)
    assert not torch.equal(batch[0], batch[1])


def test_unknown_noise_lists_the_known():
    with pytest.raises(ValueError, match="noise is 'normal'; it may be one of 'torch', 'philox'"):
        check_noise("normal")
