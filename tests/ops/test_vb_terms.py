"""The bound's terms: what they are made of, beside what every op is held to (contract/vb_terms.py)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from diffkern.ops import diffusion_loss, diffusion_loss_and_grad, vb_terms
from diffkern.ops.vb_terms.coefficients import TARGETS
from diffkern.process import FlowProcess, GaussianProcess, cosine_betas, linear_betas
from tests.ops.cases import in_layout, randn, same_bits

PROCESS = GaussianProcess(linear_betas(1000))
TABLES = PROCESS.tables()
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
OF_THE_TABLES = TABLES._fields[:6]


def grey(*shape: int, levels: int = 256, seed: int = 0) -> Tensor:
    """Images on `levels` grey levels, with both ends among them."""
    values = torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(seed))
    values.view(-1)[:2] = torch.tensor([0, levels - 1])
    return values * (2 / (levels - 1)) - 1.0


def output_for(target: str, variance: str, x0: Tensor, noise: Tensor, t: Tensor, tables) -> Tensor:
    """What a network that is off by a little would give."""
    s, sigma, c1, c2 = (table[t].to(x0.dtype).reshape(-1, *[1] * (x0.dim() - 1)) for table in tables[:4])
    x_t = s * x0 + sigma * noise
    wanted = {"eps": noise, "x0": x0, "v": s * noise - sigma * x0, "x_prev": c1 * x0 + c2 * x_t, "flow": noise - x0}
    off = 0.02 if target in ("x0", "x_prev") else 0.3
    mean = wanted[target] + off * randn(*x0.shape, seed=8, dtype=x0.dtype)
    if not variance.startswith("learned"):
        return mean
    channels = 0.5 * randn(*x0.shape, seed=9, dtype=x0.dtype) - (6 if variance == "learned" else 0)
    return torch.cat([mean, channels], dim=1)


@pytest.mark.parametrize("clip", [None, (-0.9, 0.9)])
@pytest.mark.parametrize("source", ["noise", "x_t"])
@pytest.mark.parametrize(("target", "variance"), list(itertools.product(TARGETS, VARIANCES)))
def test_gradcheck(target, variance, source, clip):
    """The reference in float64, by every argument and both decoders."""
    tables = GaussianProcess(cosine_betas(10)).tables()
    x0, noise, t = grey(3, 2, 3).double(), randn(3, 2, 3, seed=2, dtype=torch.float64), torch.tensor([0, 3, 9])
    output = output_for(target, variance, x0, noise, t, tables)
    s, sigma = (table[t].reshape(-1, 1, 1) for table in tables[:2])
    y = noise if source == "noise" else s * x0 + sigma * noise
    leaves = [v.requires_grad_() for v in (output, x0, y, *(getattr(tables, name) for name in OF_THE_TABLES))]
    for decoder in ("tanh", "exact"):

        def terms(output, x0, y, *named, decoder=decoder):
            given = tables._replace(**dict(zip(OF_THE_TABLES, named, strict=True)))
            options = {"target": target, "variance": variance, "levels": 17, "decoder": decoder, "clip": clip}
            return tuple(vb_terms(output, x0, t, given, **options, **{source: y}))

        assert torch.autograd.gradcheck(terms, leaves, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_hybrid_trains_the_variance_alone_by_the_bound(backend, target, variance):
    """Its gradient is the squared error's in the mean's channels and the bound's in the variance's."""
    x0, noise, t = grey(4, 2, 5, 5), randn(4, 2, 5, 5, seed=2), torch.tensor([0, 1, 500, 999])
    output = output_for(target, variance, x0, noise, t, TABLES)
    options = {"target": target, "variance": variance, "noise": noise, "scale": 0.5}
    found = {
        loss: diffusion_loss_and_grad(output, x0, t, TABLES, loss=loss, **options)
        for loss in ("mse", "kl", "rescaled_kl", "hybrid", "rescaled_mse")
    }
    mean, channels = slice(0, 2), slice(2, 4)
    assert not found["mse"][1][:, channels].any()
    for loss, factor in (("hybrid", 1.0), ("rescaled_mse", 1.0)):  # T = 1000: T/1000 is 1
        torch.testing.assert_close(found[loss][0], found["mse"][0] + factor * found["kl"][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(found[loss][1][:, mean], found["mse"][1][:, mean], rtol=2e-6, atol=0)
        assert same_bits(found[loss][1][:, channels], found["kl"][1][:, channels])
    torch.testing.assert_close(found["rescaled_kl"][1], 1000 * found["kl"][1], rtol=1e-6, atol=0)
    assert found["kl"][1][:, mean].any()
    for loss, (value, gradient) in found.items():
        leaf = output.clone().requires_grad_()
        alone = diffusion_loss(leaf, x0, t, TABLES, loss=loss, **{k: v for k, v in options.items() if k != "scale"})
        assert same_bits(alone.detach(), value)
        (of_leaf,) = torch.autograd.grad(0.5 * alone.sum(), leaf)
        torch.testing.assert_close(of_leaf, gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_fixed_variance_has_nothing_to_train(backend, variance):
    x0, noise, t = grey(3, 2, 5, 5), randn(3, 2, 5, 5, seed=2), torch.tensor([0, 1, 999])
    found = [
        diffusion_loss_and_grad(noise + 1, x0, t, TABLES, loss=loss, variance=variance, noise=noise, scale=1.0)
        for loss in ("mse", "hybrid", "rescaled_mse")
    ]
    for loss, gradient in found[1:]:
        assert same_bits(loss, found[0][0])
        assert same_bits(gradient, found[0][1])


@pytest.mark.parametrize("prediction", TARGETS)
@pytest.mark.parametrize("steps", [20, 1000])
def test_rescaling_counts_the_timesteps_of_the_process(backend, steps, prediction):
    tables = GaussianProcess(cosine_betas(steps), prediction, "learned_range").tables()
    x0, noise, t = grey(3, 2, 5, 5), randn(3, 2, 5, 5, seed=2), torch.tensor([0, 1, steps - 1])
    output = output_for(prediction, "learned_range", x0, noise, t, tables)
    terms = vb_terms(output, x0, t, tables, target=prediction, noise=noise)
    losses = {
        loss: diffusion_loss(output, x0, t, tables, target=prediction, loss=loss, noise=noise)
        for loss in ("kl", "rescaled_kl", "hybrid", "rescaled_mse")
    }
    assert same_bits(losses["kl"], terms.vb)
    torch.testing.assert_close(losses["rescaled_kl"], steps * terms.vb, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses["hybrid"], terms.mse + terms.vb, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses["rescaled_mse"], terms.mse + steps / 1000 * terms.vb, rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_every_source_of_x_t_says_the_same(backend, target):
    x0, t = grey(4, 3, 6, 7), torch.tensor([0, 1, 400, 999])
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(x0.shape, generator=generator)
    s, sigma = (table[t].float().reshape(-1, 1, 1, 1) for table in TABLES[:2])
    output = output_for(target, "fixed_large", x0, noise, t, TABLES)

    def terms(**source):
        return torch.stack(vb_terms(output, x0, t, TABLES, target=target, variance="fixed_large", **source))

    given = terms(noise=noise)
    assert same_bits(terms(generator=generator.manual_seed(3)), given)
    # At t = 0 float32 keeps ε in x_t to 6e-8/σ.
    torch.testing.assert_close(terms(x_t=s * x0 + sigma * noise), given, rtol=1e-4, atol=0)


def test_an_x0_network_needs_no_noise(backend):
    x0, t = grey(2, 3, 4), torch.tensor([0, 7])
    alone = vb_terms(0.9 * x0, x0, t, TABLES, target="x0")
    beside = vb_terms(0.9 * x0, x0, t, TABLES, target="x0", noise=torch.full_like(x0, torch.nan))
    for a, b in zip(alone, beside, strict=True):
        assert same_bits(a, b)


def test_the_variance_is_that_of_the_tables(backend):
    x0, t = grey(2, 2, 4), torch.tensor([0, 7])
    for variance in VARIANCES:
        output = output_for("eps", variance, x0, x0, t, TABLES)
        of_process = GaussianProcess(linear_betas(1000), variance=variance).tables()
        found = vb_terms(output, x0, t, of_process, noise=x0)
        named = vb_terms(output, x0, t, TABLES, variance=variance, noise=x0)
        assert all(same_bits(a, b) for a, b in zip(found, named, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_no_term_depends_on_the_batch_or_on_the_gradient(backend, variance, layout):
    """Nor on the number of threads: above 32,768 values there are two."""
    x0, noise, t = grey(5, 3, 64, 48), randn(5, 3, 64, 48, seed=2), torch.tensor([0, 3, 0, 500, 999])
    output = output_for("eps", variance, x0, noise, t, TABLES)
    output, x0 = in_layout(output, layout), in_layout(x0, layout)
    options = {"variance": variance, "seed": 3}
    whole = vb_terms(output, x0, t, TABLES, samples=torch.arange(5) + 70, **options)
    loss, gradient = diffusion_loss_and_grad(
        output, x0, t, TABLES, loss="kl", scale=0.5, samples=torch.arange(5) + 70, **options
    )
    assert same_bits(loss, whole.vb)
    for n in range(5):
        one = slice(n, n + 1)
        alone = vb_terms(output[one], x0[one], t[one], TABLES, samples=70 + n, **options)
        assert all(same_bits(a, b[one]) for a, b in zip(alone, whole, strict=True))
        _, slope = diffusion_loss_and_grad(
            output[one], x0[one], t[one], TABLES, loss="kl", scale=0.5, samples=70 + n, **options
        )
        assert same_bits(slope, gradient[one])


def test_there_is_no_second_derivative(backend):
    """Rather than a wrong one."""
    output = randn(2, 3).requires_grad_()
    loss = diffusion_loss(output, output.detach(), torch.tensor([0, 5]), TABLES, loss="kl", seed=1)
    (first,) = torch.autograd.grad(loss.sum(), output, create_graph=True)
    with pytest.raises(RuntimeError, match="vb_terms_and_grad has no derivative"):
        torch.autograd.grad(first.sum(), output)


def test_tables_that_change_are_read_again(backend):
    """What is made of them is kept from call to call."""
    x0, noise, t = grey(2, 2, 4), randn(2, 2, 4, seed=2), torch.tensor([3, 7])
    tables = PROCESS.tables()
    before = vb_terms(noise + 1, x0, t, tables, noise=noise).vb
    tables.posterior_mean_coef1.mul_(2)
    after = vb_terms(noise + 1, x0, t, tables, noise=noise).vb
    # The difference of the means is twice as large, and of a KL with equal variances there is nothing else.
    torch.testing.assert_close(after, 4 * before, rtol=1e-6, atol=0)
    with torch.inference_mode():
        of_inference = PROCESS.tables()
        assert same_bits(vb_terms(noise + 1, x0, t, of_inference, noise=noise).vb, before)
        of_inference.posterior_mean_coef1.mul_(2)
        assert same_bits(vb_terms(noise + 1, x0, t, of_inference, noise=noise).vb, after)
    leaf = (noise + 1).requires_grad_()
    loss = diffusion_loss(
        leaf, x0, t, tables, loss="kl", noise=noise
    )  # autograd saves what inference mode may have made
    assert torch.autograd.grad(loss.sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("decoder", ["tanh", "exact"])
@pytest.mark.parametrize("channel", [0, 2], ids=["mean", "variance"])
def test_nan_stays_nan_through_the_decoder(backend, channel, decoder):
    """Whose clamps and exponentials could turn it into a number."""
    x0, t = grey(3, 2, 21), torch.zeros(3, dtype=torch.int64)
    output = output_for("x0", "learned", x0, x0, t, TABLES)
    output[1, channel, 5] = torch.nan
    leaf = output.requires_grad_()
    vb = vb_terms(leaf, x0, t, TABLES, target="x0", variance="learned", decoder=decoder).vb
    (gradient,) = torch.autograd.grad(vb.sum(), leaf)
    assert vb.isnan().tolist() == [False, True, False]
    assert bool(gradient[1, [0, 2], 5].isnan().all())
    assert bool(gradient[[0, 2]].isfinite().all())


def test_a_term_may_be_written_into(backend):
    x0, noise, t = grey(2, 2, 4), randn(2, 2, 4, seed=2), torch.tensor([0, 7])
    output = (noise + 1).requires_grad_()
    terms = vb_terms(output, x0, t, TABLES, noise=noise)
    before = terms.mse.detach().clone()
    terms.vb.mul_(2).sum().backward()
    plain = (noise + 1).requires_grad_()
    vb_terms(plain, x0, t, TABLES, noise=noise).vb.sum().backward()
    torch.testing.assert_close(output.grad, 2 * plain.grad)
    assert torch.equal(terms.mse, before)


@pytest.mark.parametrize("loss", ["kl", "hybrid"])
def test_a_process_without_a_posterior_is_said_to_be_one(loss):
    x0, t = grey(2, 2, 4), torch.tensor([0, 7])
    with pytest.raises(ValueError, match="posterior is a GaussianProcess's"):
        diffusion_loss(x0, x0, t, FlowProcess().tables(), loss=loss, seed=1)


def test_levels_may_be_counted_by_numpy():
    x0, t = grey(2, 2, 4, levels=17), torch.tensor([0, 7])
    found = [diffusion_loss(x0, x0, t, TABLES, loss="kl", seed=1, levels=levels) for levels in (17, np.int64(17))]
    assert torch.equal(*found)
