"""Gradients of losses and of the bound's terms: in one pass, through the methods, and exact ones."""

import numpy as np
import pytest
import torch

from diffkern.integrations.guided_diffusion import (
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
)
from tests.integrations.guided_diffusion.exact_losses import Exact
from tests.integrations.guided_diffusion.small import (
    LEARNED,
    SHAPE,
    STEPS,
    by_methods,
    diffusion,
    gradient_of,
    images,
    mean_model,
    model,
    network_for,
)


@pytest.mark.parametrize("loss", list(LossType))
@pytest.mark.parametrize("variance", list(ModelVarType))
@pytest.mark.parametrize("mean", list(ModelMeanType))
def test_both_roads_agree(mean, variance, loss):
    x0, t = images()
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    d = diffusion(SpacedDiffusion, range(STEPS), mean=mean, variance=variance, loss=loss)
    terms, gradient = gradient_of(d, x0, t, noise)
    expected, expected_gradient = gradient_of(by_methods(d), x0, t, noise)
    assert terms.keys() == expected.keys()
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    for ours, wanted in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("variance", LEARNED)
@pytest.mark.parametrize("mean", list(ModelMeanType))
def test_the_hybrid_trains_the_mean_by_squared_error_and_the_variance_by_the_bound(mean, variance):
    x0, t = images()
    noise = torch.randn(SHAPE)
    for d in (diffusion(mean=mean, variance=variance), by_methods(diffusion(mean=mean, variance=variance))):
        _, of_mse = gradient_of(d, x0, t, noise, "mse")
        _, of_vb = gradient_of(d, x0, t, noise, "vb")
        assert of_mse[:, 3:].abs().max() == 0
        assert of_vb[:, :3].abs().max() == 0
        assert (of_mse[:, :3].abs().amax((1, 2, 3)) > 0).all()
        assert (of_vb[:, 3:].abs().amax((1, 2, 3)) > 0).all()


def test_a_samples_weight_reaches_its_gradient():
    """And what is done to one term is not done to the other."""
    x0, t = images()
    noise, weight = torch.randn(SHAPE), torch.tensor([1.0, 0.0, -2.0, 3.0])
    leaf = model(x0, t).requires_grad_()
    terms = diffusion().training_losses(lambda x, t: leaf, x0, t, noise=noise)
    (weight * terms["mse"] + terms["vb"] ** 2).sum().backward()
    vb = terms["vb"].detach()
    (plain,) = torch.autograd.grad(
        sum(diffusion().training_losses(lambda x, t: leaf, x0, t, noise=noise)[k].sum() for k in ("mse", "vb")), leaf
    )
    column = (4, 1, 1, 1)
    torch.testing.assert_close(leaf.grad[:, :3], weight.reshape(column) * plain[:, :3])
    torch.testing.assert_close(leaf.grad[:, 3:], 2 * vb.reshape(column) * plain[:, 3:])


@pytest.mark.parametrize("loss", list(LossType))
@pytest.mark.parametrize("variance", [ModelVarType.FIXED_SMALL, *LEARNED])
@pytest.mark.parametrize("mean", list(ModelMeanType))
def test_first_and_second_derivatives_in_float64(mean, variance, loss):
    """t = 0, whose end bins and floor are in it, and others."""
    x0, t = images(shape=(3, 1, 2, 2))[0].double(), torch.tensor([0, 5, 19])
    d = diffusion(mean=mean, variance=variance, loss=loss)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def terms(*channels):
        found = d.training_losses(lambda x, t: torch.cat(channels, dim=1), x0, t, noise=noise)
        return tuple(found[name] for name in ("mse", "vb") if name in found) or found["loss"]

    near = noise if mean == ModelMeanType.EPSILON else x0  # so that t = 0 is above the floor
    output = near.repeat(1, 2 if variance in LEARNED else 1, 1, 1)
    output = (output + 0.1 * network_for(d)(d.q_sample(x0, t, noise), t)).requires_grad_()
    if loss.is_vb() or variance not in LEARNED:
        assert torch.autograd.gradcheck(terms, output)
        assert torch.autograd.gradgradcheck(terms, output, atol=1e-4)
        return
    # vb depends on the mean's channels, by which it has no gradient.
    of_mean, of_variance = (channels.detach().requires_grad_() for channels in output.chunk(2, dim=1))
    assert torch.autograd.gradcheck(lambda v: terms(of_mean.detach(), v), of_variance)
    assert torch.autograd.gradcheck(lambda m: terms(m, of_variance.detach())[0], of_mean)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", list(ModelVarType))
@pytest.mark.parametrize("mean", list(ModelMeanType))
def test_a_term_and_its_gradients_are_exact(mean, variance, clip):
    """By the network's parameters, through `output` and `pred_xstart`, without clipping and with."""
    x0, t = images()
    x_t = diffusion().q_sample(x0, t, torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)))
    d = diffusion(SpacedDiffusion, range(STEPS), mean=mean, variance=variance)
    leaf = network_for(d)(x_t, t).requires_grad_()
    found = d._vb_terms_bpd(lambda x, t: leaf, x_start=x0, x_t=x_t, t=t, clip_denoised=clip)
    assert set(found) == {"output", "pred_xstart"}
    wide = leaf.detach().double().requires_grad_()
    exact = Exact(d, wide, x0, x_t, t, clip)
    np.testing.assert_allclose(found["output"].detach(), exact.vb().detach(), rtol=2e-5)
    np.testing.assert_allclose(found["pred_xstart"].detach(), exact.predicted.detach(), rtol=1e-5, atol=1e-4)
    (found["output"].sum() + found["pred_xstart"].square().sum()).backward()
    (exact.vb().sum() + exact.predicted.square().sum()).backward()
    for ours, wanted in zip(leaf.grad.double(), wide.grad, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    with torch.no_grad():
        plain = d._vb_terms_bpd(lambda x, t: leaf, x_start=x0, x_t=x_t, t=t, clip_denoised=clip)
    for name, value in plain.items():
        torch.testing.assert_close(value, found[name].detach(), rtol=1e-5, atol=1e-4)


def test_gradients_by_the_images_go_through_the_methods():
    x0, t = images(shape=(3, 1, 2, 2))[0].double(), torch.tensor([1, 5, 19])
    noise = torch.randn_like(x0)
    for loss in (LossType.MSE, LossType.KL):
        d = diffusion(variance=ModelVarType.FIXED_SMALL, loss=loss)
        arguments = (x0.clone().requires_grad_(), noise.clone().requires_grad_())
        assert torch.autograd.gradcheck(
            lambda x0, noise, d=d: d.training_losses(mean_model, x0, t, noise=noise)["loss"], arguments
        )


@pytest.mark.parametrize("loss", [LossType.MSE, LossType.RESCALED_KL])
def test_under_compile_and_transforms(loss):
    x0, t = images()
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    d = diffusion(loss=loss)
    weight = torch.tensor(0.9)

    def total(weight):
        return d.training_losses(lambda x, t: weight * model(x, t), x0, t, noise=noise)["loss"].sum()

    expected = total(weight)
    torch.testing.assert_close(torch.compile(total, backend="eager")(weight), expected, rtol=1e-4, atol=0)
    leaf = weight.clone().requires_grad_()
    (slope,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, leaf)
    torch.testing.assert_close(torch.func.grad(total)(weight), slope.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.func.grad(torch.func.grad(total))(weight), curvature, rtol=1e-3, atol=1e-4)
