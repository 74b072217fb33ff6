import numpy as np
import pytest
import torch

from diffkern.process import GaussianProcess, linear_betas
from diffkern.sampling import Sampler
from tests.sampling.networks import CLASSES, Conditional, Unconditional

SHAPE = (3, 4, 6)


def make_process():
    return GaussianProcess(linear_betas(100))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shape": (3, 4)}, r"shape is \(3, 4\)"),
        ({"shape": (3, -1, 4)}, r"shape is \(3, -1, 4\)"),
        ({"solver": "dpm"}, "solver is 'dpm'"),
        ({"engine": "graph"}, "engine is 'graph'; it may be 'eager'"),
        ({"steps": 101}, "steps is 101"),
        ({"steps": 0}, "steps is 0"),
        ({"eta": 2.0}, "eta is 2"),
        ({"solver": "ddpm", "eta": 0.5}, "eta is 0.5"),
        ({"clip": (1, -1)}, "clip is"),
        ({"clip": 1.0}, "clip is 1.0; it must be"),
        ({"threshold": 0.995}, "threshold is 0.995; it must be"),
        ({"threshold": (0.995,)}, r"threshold is \(0.995,\); it must be"),
        ({"shape": (3, 4.5, 6)}, r"shape is \(3, 4.5, 6\)"),
        ({"steps": True}, "steps is True; it must be a whole number"),
        ({"steps": True, "sigmas": "karras"}, "steps is True; it must be a whole number"),
        ({"steps": 2.5, "sigmas": "karras"}, "steps is 2.5; it must be a whole number"),
        ({"steps": "5", "sigmas": "karras"}, "steps is '5'; with sigmas it must be an int"),
        ({"guidance_scale": 2.0, "null_label": 3.5}, "null_label is 3.5; it must be a whole number"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": 2.0}, "null_label must be given"),
    ],
)
def test_a_bad_sampler_is_refused(kwargs, message):
    arguments = {"model": Unconditional(), "process": make_process(), "shape": SHAPE, "steps": 5, **kwargs}
    with pytest.raises(ValueError, match=message):
        Sampler(**arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n": -1}, "n is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"labels": None}, "labels must be given"),
        ({"labels": [0]}, "labels are torch.int64 of shape"),
        ({"labels": [0.0, 1.0]}, "labels are torch.float32"),
        ({"labels": [True, False]}, "labels are torch.bool"),
        ({"labels": [0, CLASSES]}, r"labels must be in \[0, 4\); one is 4"),
        ({"labels": [-1, 0]}, r"labels must be in \[0, 4\); one is -1"),
        ({"start": (torch.zeros(2, *SHAPE), 100)}, "t is 100; it must be an int"),
        ({"start": (torch.zeros(2, *SHAPE), torch.tensor([3, 3]))}, "t is tensor"),
        ({"start": (torch.zeros(2, *SHAPE), True)}, "t is True; it must be an int"),
        ({"start": (torch.zeros(2, 3, 4, 4), 3)}, r"start\[0\] is torch.float32 of shape"),
        ({"start": (torch.zeros(2, *SHAPE, dtype=torch.int64), 3)}, r"start\[0\] is torch.int64"),
        ({"start": (torch.zeros(1, *SHAPE), 3)}, r"start\[0\] holds 1 images; n is 2"),
    ],
)
def test_a_bad_run_is_refused_before_the_model_is_called(kwargs, message):
    model = Conditional()
    sampler = Sampler(model, make_process(), SHAPE, steps=5)
    arguments = {"n": 2, "labels": [0, 1], **kwargs}
    with pytest.raises(ValueError, match=message):
        sampler.sample(**arguments)
    if "batch_size" not in kwargs:
        with pytest.raises(ValueError, match=message):
            sampler.sample_progressive(**arguments)
    assert not model.calls


def test_labels_for_a_model_that_says_it_has_none():
    model = Unconditional()
    model.num_classes = None
    with pytest.raises(ValueError, match="labels must be None"):
        Sampler(model, make_process(), SHAPE, steps=5).sample(2, labels=[0, 1])


def test_noise_to_checks_its_arguments():
    sampler = Sampler(Unconditional(), make_process(), SHAPE, steps=5)
    with pytest.raises(ValueError, match="t is -1"):
        sampler.noise_to(torch.zeros(2, *SHAPE), -1)
    with pytest.raises(ValueError, match=r"x0 is torch\.float32 of shape"):
        sampler.noise_to(torch.zeros(2, 3), 1)


def test_a_model_output_of_the_wrong_shape_is_named():
    sampler = Sampler(lambda x, t: x[:, :1], make_process(), SHAPE, steps=5)
    with pytest.raises(ValueError, match="model_output"):
        sampler.sample(2)


def test_a_shape_of_numpy_integers():
    assert Sampler(Unconditional(), make_process(), tuple(np.array(SHAPE)), steps=5).sample(1).shape == (1, *SHAPE)


@pytest.mark.parametrize("sigmas", [None, "karras"])
def test_steps_may_be_any_integer(sigmas):
    five = (5, np.int64(5))
    programs = [Sampler(Unconditional(), make_process(), SHAPE, steps=steps, sigmas=sigmas).program for steps in five]
    np.testing.assert_array_equal(programs[0].coefficients, programs[1].coefficients)


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"model": lambda x, t: None}, "model must return a tensor, got NoneType"),
        ({"model": lambda x, t: (x, x)}, "model must return a tensor, got tuple"),
        ({"cond_fn": lambda x, t: None}, "cond_fn must return a tensor, got NoneType"),
    ],
)
def test_a_function_that_returns_no_tensor_is_refused(functions, message):
    sampler = Sampler(**{"model": Unconditional(), "process": make_process(), "shape": SHAPE, "steps": 5, **functions})
    with pytest.raises(TypeError, match=message):
        sampler.sample(2)
