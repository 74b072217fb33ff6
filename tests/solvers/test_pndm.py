"""PLMS and PNDM against the paper's loops and diffusers."""

import functools

import numpy as np
import pytest

from diffkern.process import GaussianProcess, cosine_betas, linear_betas
from diffkern.solvers import chain, ddim, halfway, plms, pndm, single_steps
from tests.golden_data import error
from tests.solvers.levels import LINEAR_LEVELS, SCALES, data, run, scaled
from tests.stub_networks import net

NETWORK = functools.partial(net, a=1.3, b=0.01, w=0.8)
WEIGHTS = {1: [1], 2: [1.5, -0.5], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


def network(x, t):
    return NETWORK(x, np.full(len(x), t))


def eps_of(x, a, s, t, prediction, clip):
    """ε from what the network says of x = a·x0 + s·ε, and from the clipped x0 if there is a clip."""
    m, k2 = network(x, t), a**2 + s**2
    x0 = {"eps": (x - s * m) / a if a else None, "x0": m, "v": a / k2 * x - s / np.sqrt(k2) * m}[prediction]
    return (x - a * (x0 if clip is None else np.clip(x0, *clip))) / s


def phi(x, eps, here, there):
    """Eq. 11, as DDIM."""
    (a, s), (a_next, s_next) = here, there
    return a_next * (x - s * eps) / a + s_next * eps


def loop(x, nodes, middles, prediction, clip):
    """The states after each of the paper's steps; nodes and middles are (α, σ, t), without middles PLMS."""
    history, states = [], [x]
    last = len(nodes) - 2
    for i, here in enumerate(nodes[:-1]):
        x, there = states[-1], nodes[i + 1]
        e = eps_of(x, *here, prediction, clip)
        if i < last and (i < 3 if middles else i == 0):
            history.append(e)
            if middles:
                half = middles[i]
                e2 = eps_of(phi(x, e, here[:2], half[:2]), *half, prediction, clip)
                e3 = eps_of(phi(x, e2, here[:2], half[:2]), *half, prediction, clip)
                e4 = eps_of(phi(x, e3, here[:2], there[:2]), *there, prediction, clip)
                e = (e + 2 * e2 + 2 * e3 + e4) / 6
            else:
                e = (e + eps_of(phi(x, e, here[:2], there[:2]), *there, prediction, clip)) / 2
        else:
            history = [*history[-3:], e]
            e = sum(w * h for w, h in zip(WEIGHTS[len(history)], reversed(history), strict=True))
        states.append(phi(x, e, here[:2], there[:2]))
    return states


@pytest.mark.parametrize("clip", [None, (-1, 1)])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(
    "levels", [LINEAR_LEVELS, LINEAR_LEVELS[:-1], *(LINEAR_LEVELS[-n:] for n in (2, 3, 4, 5))], ids=len
)
def test_every_scale_of_x_goes_the_papers_way(levels, prediction, scale, clip):
    between = (levels[1:] + levels[:-1]) / 2
    (alpha, sigma), (alpha_2, sigma_2) = scaled(scale, levels), scaled(scale, between)
    times = np.arange(len(levels), dtype=float)
    nodes = list(zip(alpha, sigma, times, strict=True))
    middles = list(zip(alpha_2, sigma_2, times[:-1] + 0.5, strict=True))
    steps = chain(alpha, sigma, times[:-1], prediction)
    halves = single_steps(alpha_2, sigma_2, alpha_2, sigma_2 / 2, times[:-1] + 0.5, prediction)
    x = data(levels)[0] * alpha[0]
    several = min(3, len(levels) - 2)
    for program, expected, rows_each in (
        (plms(steps, clip=clip), loop(x, nodes, None, prediction, clip), [2] * min(1, several)),
        (pndm(steps, halves, clip=clip), loop(x, nodes, middles, prediction, clip), [4] * several),
    ):
        ends = np.cumsum(rows_each + [1] * (len(levels) - 1 - len(rows_each))) - 1
        assert program.num_rows == ends[-1] + 1
        states = run(program, network, x)
        for step, row in enumerate(ends, 1):
            assert error(states[row], expected[step]) < 1e-11, step


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_which_rows_there_are(steps):
    process = GaussianProcess(cosine_betas(1000)).respace(steps)
    program = plms(process)
    t = process.timestep_map[::-1].tolist()
    assert program.times.tolist() == (t if steps == 1 else [*t[:2], *t[1:]])
    if steps == 1:
        np.testing.assert_allclose(run(program, network, x := data(np.ones(2))[0]), run(ddim(process), network, x))


def test_zero_terminal_snr_begins_after_a_step_of_ddim():
    full = GaussianProcess(np.append(linear_betas(1000)[:-1], 1.0), "v")
    process = full.respace(8)
    t = process.timestep_map[::-1].tolist()
    x, _ = data(np.ones(2))
    middles = halfway(process, full)
    after = ddim(process)
    start = run(after, network, x)[0]
    rest = process.keep(np.arange(7))
    for program, other in (
        (plms(process), plms(rest)),
        (pndm(process, middles), pndm(rest, halfway(rest, full))),
    ):
        assert program.times.tolist() == [t[0], *other.times]
        assert error(run(program, network, x)[-1], run(other, network, start)[-1]) < 1e-12
    assert plms(process.keep([7])).num_rows == 1


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("steps", [5, 10, 25])
def test_diffusers_where_it_is_installed(steps, skip):
    """Its spacing "leading"; of the process, the levels that it visits."""
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("diffusers").PNDMScheduler(skip_prk_steps=skip, set_alpha_to_one=True)
    full = GaussianProcess(linear_betas(1000))
    peer.alphas_cumprod = torch.tensor(full.alphas_cumprod)
    peer.set_timesteps(steps)
    process = full.keep(np.arange(steps) * (1000 // steps))
    program = plms(process, clip=None) if skip else pndm(process, halfway(process, full), clip=None)
    assert program.times.tolist() == peer.timesteps.tolist()
    x, _ = data(np.ones(2))
    states = run(program, network, x)
    for state, t in zip(states, peer.timesteps.tolist(), strict=True):
        x = peer.step(torch.from_numpy(network(x, float(t))), t, torch.from_numpy(x)).prev_sample.numpy()
        assert error(state, x) < 1e-9, t


def test_what_cannot_be():
    full = GaussianProcess(linear_betas(1000))
    steps = full.respace(10)
    with pytest.raises(ValueError, match="middles have 1 rows; they must have one for each of 3 Runge–Kutta steps"):
        pndm(steps, halfway(full.respace(2), full))
    with pytest.raises(ValueError, match=r"middles\[0\] has sigma/alpha"):
        pndm(steps, halfway(full.keep([0, 2, 4, 6, 8]), full))
    with pytest.raises(ValueError, match="the process has 900 of 1000 steps"):
        halfway(full.respace(900), full)
    with pytest.raises(ValueError, match="the process has 1 steps; Runge–Kutta needs 2 at least"):
        halfway(full.respace(1), full)
    with pytest.raises(ValueError, match="this solver needs rows that follow each other"):
        plms(single_steps([1.0, 1.0], [3.0, 1.0], [1.0, 1.0], [2.0, 0.5], [1, 0], "x0"))
