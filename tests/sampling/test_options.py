"""The Sampler's options: which levels it visits, thresholding, guidance by a classifier, flows and inversion."""

import numpy as np
import pytest
import torch

from diffkern.ops import philox_normal, solver_step
from diffkern.process import (
    SIGMA_SPACINGS,
    FlowProcess,
    GaussianProcess,
    linear_betas,
    make_betas,
    space_sigmas,
    space_timesteps,
    zero_terminal_snr,
)
from diffkern.sampling import Sampler
from diffkern.solvers import SOLVERS, build, grid
from tests.golden_data import error, load
from tests.sampling import reference
from tests.sampling.networks import CLASSES, Conditional, Unconditional

SHAPE = (3, 4, 6)
PROCESS = GaussianProcess(linear_betas(100))
NOISY = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde")
# Those whose steps may begin at noise alone, and that add none.
FLOWING = [
    name
    for name, entry in SOLVERS.items()
    if not entry.own_steps and name not in (*NOISY, "dpm_solver_2m", "dpm_solver_3m")
]


def times_of(model):
    return [t[0].item() for _, t in model.calls]


def check(sampler, process, model, seed=7, n=3):
    """The sampler's states against its program executed in float64 NumPy."""
    with torch.no_grad():
        expected = reference.run_table(
            lambda x, t: model.evaluate(x, torch.tensor([t])), sampler.program, reference.x_T(n, SHAPE, seed), seed
        )
    states = list(sampler.sample_progressive(n, seed=seed))
    for (_, x, x0), (x_ref, x0_ref) in zip(states, expected, strict=True):
        assert error(x.numpy(), x_ref.numpy()) < reference.tolerance(sampler.program)
        assert error(x0.numpy(), x0_ref.numpy()) < 10 * reference.tolerance(sampler.program)
    assert torch.equal(sampler.sample(n, seed=seed), states[-1][1])


@pytest.mark.parametrize(("spacing", "steps_offset"), [("leading", 3), ("trailing", 0), ("linspace", 0)])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "deis"])
def test_spacings(solver, spacing, steps_offset):
    model = Unconditional()
    sampler = Sampler(model, PROCESS, SHAPE, solver=solver, steps=7, spacing=spacing, steps_offset=steps_offset)
    check(sampler, PROCESS, model)
    expected = space_timesteps(100, 7, spacing=spacing, steps_offset=steps_offset)[::-1]
    assert times_of(model)[:7] == expected
    assert model.calls[0][1].dtype == torch.int64
    model.calls.clear()
    sampler.sample(1, start=(torch.zeros(1, *SHAPE), 50))
    assert times_of(model) == [50, *(t for t in expected if t < 50)]


class TestSigmas:
    @pytest.mark.parametrize("sigmas", SIGMA_SPACINGS)
    @pytest.mark.parametrize("solver", ["ddim", "lms", "dpmpp_2m"])
    def test_levels_and_times(self, solver, sigmas):
        """σ̂ falls from that of T−1 to that of 0, α² + σ² = 1, and the network is given where log σ̂ is that, float32."""
        model = Unconditional()
        sampler = Sampler(model, PROCESS, SHAPE, solver=solver, steps=9, sigmas=sigmas)
        check(sampler, PROCESS, model)
        table = np.sqrt(1 / PROCESS.alphas_cumprod - 1)
        expected = space_sigmas(sigmas, 9, table[0], table[-1])
        levels = grid(PROCESS, 9, sigmas=sigmas)
        np.testing.assert_allclose(levels.sigma / levels.alpha, expected, rtol=1e-12)
        np.testing.assert_allclose(levels.sigma**2 + levels.alpha**2, 1, rtol=1e-12)
        assert (levels.sigma_next[-1], levels.alpha_next[-1]) == (0, 1)
        np.testing.assert_allclose(np.interp(levels.times, np.arange(100), np.log(table)), np.log(expected), atol=1e-12)
        assert model.calls[0][1].dtype == torch.float32
        np.testing.assert_allclose(times_of(model)[:9], levels.times, rtol=1e-6)

    def test_start(self):
        """From timestep t, then the levels below it."""
        model = Unconditional()
        sampler = Sampler(model, PROCESS, SHAPE, steps=9, sigmas="karras")
        below = sampler.program.times[sampler.program.times < 40]
        sampler.sample(1, start=(torch.zeros(1, *SHAPE), 40))
        np.testing.assert_allclose(times_of(model), [40, *below], rtol=1e-6)
        whole = sampler.sample(2, seed=1)
        first = philox_normal((2, *SHAPE), 1, stream=1)
        torch.testing.assert_close(sampler.sample(2, start=(first, 99)), whole, rtol=0, atol=1e-6)

    def test_a_learned_variance_is_ignored(self):
        learned = GaussianProcess(PROCESS.betas, variance="learned_range")
        images = Sampler(Unconditional(learned=True), learned, SHAPE, steps=5, sigmas="karras").sample(2)
        assert torch.equal(images, Sampler(Unconditional(), PROCESS, SHAPE, steps=5, sigmas="karras").sample(2))

    def test_of_a_respaced_process(self):
        """Its network is given timesteps of the original one, between those that were kept."""
        short = GaussianProcess(linear_betas(1000)).respace(100)
        times = build("ddim", short, 9, sigmas="exponential").times
        np.testing.assert_allclose(times[[0, -1]], [999, 0], atol=1e-9)
        assert (np.diff(times) < 0).all()

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"sigmas": "even"}, "spacing is 'even'; it may be one of 'linear', 'karras'"),
            ({"sigmas": "karras", "spacing": "leading"}, "with sigmas there is no choice"),
            ({"sigmas": "karras", "steps": "ddim5"}, "steps is 'ddim5'; with sigmas it must be an int"),
            ({"sigmas": "karras", "steps": 101}, r"steps is 101; it must be in \[1, 100\]"),
            ({"sigmas": "karras", "steps": 0}, r"steps is 0; it must be in \[1, 100\]"),
            ({"sigmas": "karras", "solver": "ddpm"}, "'ddpm' needs the steps of a GaussianProcess, and sigmas=None"),
            ({"spacing": "even"}, "spacing is 'even'; it may be one of 'respaced'"),
            ({"spacing": "trailing", "steps_offset": 1}, "steps_offset is 1"),
            ({"steps": 2.5}, "steps is 2.5; it must be a whole number"),
            ({"order": 2}, "order is 2; the solver 'ddim' takes eta"),
            ({"solver": "lms", "order": 7}, "order is 7"),
            ({"solver": "lms", "eta": 1.0}, "eta is 1.0; the solver 'lms' takes order"),
            ({"threshold": (2.0, 1.0)}, "threshold is"),
            ({"guidance_rescale": 0.5}, "guidance_rescale is 0.5; it needs a guidance_scale"),
            ({"guidance_rescale": 1.5}, r"guidance_rescale is 1.5; it must be in \[0, 1\]"),
            ({"solver": "lms", "cond_fn": torch.sin}, "'lms' takes no classifier's gradient; those that do are 'ddpm'"),
        ],
    )
    def test_errors_name_the_argument(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            Sampler(Unconditional(), PROCESS, SHAPE, **{"steps": 5, **kwargs})

    def test_infinite_sigma(self):
        process = GaussianProcess(zero_terminal_snr(PROCESS.betas), "v")
        with pytest.raises(ValueError, match="alphas_cumprod ends at 0, where σ/α is infinite"):
            build("ddim", process, 5, sigmas="karras")


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("s_min", [0.0, 1.0])
def test_churn(solver, s_min):
    """Also where noise comes in before the first step, in a row that calls no model and is not shown."""
    model = Unconditional()
    sampler = Sampler(model, PROCESS, SHAPE, solver=solver, steps=7, s_churn=2.0, s_min=s_min, s_noise=1.01)
    check(sampler, PROCESS, model)
    assert [row for row, _, _ in sampler.sample_progressive(1)] == list(range(1, sampler.program.num_rows))
    assert model.calls[0][1].dtype == torch.float32
    with pytest.raises(ValueError, match="s_churn is"):
        Sampler(model, PROCESS, SHAPE, solver=solver, steps=7, s_churn=-1.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_dynamic_thresholding(solver):
    """With a largest value of 1 it is clipping; with more, x0 is what the formula says, of every sample its own."""
    clipped = Sampler(Unconditional(), PROCESS, SHAPE, solver=solver, steps=6).sample(3)
    thresholded = Sampler(Unconditional(), PROCESS, SHAPE, solver=solver, steps=6, threshold=(0.9, 1.0)).sample(3)
    torch.testing.assert_close(thresholded, clipped, rtol=1e-5, atol=1e-6)

    sampler = Sampler(Unconditional(), PROCESS, SHAPE, solver=solver, steps=6, threshold=(0.9, 2.5))
    assert sampler.program.threshold == (0.9, 2.5)
    free = Sampler(Unconditional(), PROCESS, SHAPE, solver=solver, steps=6, clip=None)
    (_, _, x0), (_, _, raw) = (next(s.sample_progressive(3)) for s in (sampler, free))
    scale = torch.quantile(raw.flatten(1).abs().double(), 0.9, dim=1).clamp(1, 2.5).reshape(-1, 1, 1, 1)
    expected = torch.minimum(torch.maximum(raw.double(), -scale), scale) / scale
    assert error(x0.numpy(), expected.numpy()) < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_rescale(solver):
    """The mean has φ of the standard deviation of the conditional output and 1−φ of its own (eqs. 15, 16)."""
    model, labels = Conditional(), [0, 3, 1]
    arguments = {"solver": solver, "steps": 6, "guidance_scale": 3.0, "clip": None}
    sampler = Sampler(model, PROCESS, SHAPE, guidance_rescale=0.7, **arguments)
    row, _, x0 = next(sampler.sample_progressive(3, labels=labels))
    x = philox_normal((3, *SHAPE), 0, stream=1).double()
    u, c = (
        model.evaluate_label(x, torch.tensor([99]), y).detach()
        for y in (torch.full((3,), CLASSES), torch.tensor(labels))
    )
    m = u + 3.0 * (c - u)
    ratio = c.flatten(1).std(1) / m.flatten(1).std(1)
    m = m * (0.7 * ratio + 0.3).reshape(-1, 1, 1, 1)
    abar = PROCESS.alphas_cumprod[99]
    expected = (x - (1 - abar) ** 0.5 * m) / abar**0.5
    assert row == 0
    assert error(x0.numpy(), expected.numpy()) < 1e-5
    plain = Sampler(model, PROCESS, SHAPE, **arguments).sample(3, labels=labels)
    none = Sampler(model, PROCESS, SHAPE, guidance_rescale=0.0, **arguments).sample(3, labels=labels)
    assert torch.equal(plain, none)


class TestClassifier:
    @staticmethod
    def gradient(x, t, y=None):
        return 0.5 * torch.sin(x + (0 if y is None else 0.1 * y.reshape(-1, 1, 1, 1)) + 0.01 * t.reshape(-1, 1, 1, 1))

    @pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range", "learned"])
    def test_ddpm_shifts_the_mean(self, variance):
        """Dhariwal & Nichol, algorithm 1: by the variance of the step times the gradient."""
        process = GaussianProcess(PROCESS.betas, variance=variance).respace(8)
        model = Unconditional(learned=variance.startswith("learned"))
        guided = Sampler(model, process, SHAPE, solver="ddpm", steps=None, cond_fn=self.gradient)
        plain = build("ddpm", process)
        before = philox_normal((2, *SHAPE), 5, stream=1)
        for row, x, _ in guided.sample_progressive(2, seed=5):
            t = 7 - row
            at = torch.full((2,), int(process.timestep_map[t]))
            unguided = solver_step(before, model.evaluate(before, at).detach(), plain, row, seed=5)
            if process.model_variance is not None:
                sigma2 = torch.tensor(process.model_variance[t])
            else:
                out = model.evaluate(before, at).detach()[:, 3:]
                low, high = process.posterior_log_variance_clipped[t], np.log(process.betas[t])
                sigma2 = torch.exp(out if variance == "learned" else low + (out + 1) / 2 * (high - low))
            expected = unguided.double() + sigma2 * self.gradient(before, at).double()
            assert error(x.numpy(), expected.numpy()) < 1e-6
            before = x

    @pytest.mark.parametrize("eta", [0.0, 0.5])
    @pytest.mark.parametrize("clip", [None, (-1, 1)])
    def test_ddim_shifts_the_score(self, clip, eta):
        """Algorithm 2: ε̂ = ε − √(1−ᾱ)·gradient, of the clipped x0, and x0 from it, in the loop as it is printed."""
        process, model = PROCESS.respace(8), Unconditional()
        sampler = Sampler(model, process, SHAPE, steps=None, clip=clip, eta=eta, cond_fn=self.gradient)
        x = reference.x_T(2, SHAPE, 5)
        for row, state, _ in sampler.sample_progressive(2, seed=5):
            t = 7 - row
            at = torch.full((2,), int(process.timestep_map[t]))
            a, prev = process.alphas_cumprod[t], process.alphas_cumprod_prev[t]
            with torch.no_grad():
                x0 = (x - (1 - a) ** 0.5 * model.evaluate(x, at)) / a**0.5
            x0 = x0 if clip is None else x0.clamp(*clip)
            eps = (x - a**0.5 * x0) / (1 - a) ** 0.5 - (1 - a) ** 0.5 * self.gradient(x, at)
            x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
            std = eta * ((1 - prev) / (1 - a) * (1 - a / prev)) ** 0.5
            noise = philox_normal(tuple(x.shape), 5, draw=row, stream=2).double()
            x = prev**0.5 * x0 + max(1 - prev - std**2, 0) ** 0.5 * eps + std * noise
            assert error(state.numpy(), x.numpy()) < 2e-5, row

    def test_labels_timesteps_and_batches(self):
        seen = []

        def cond_fn(x, t, y):
            seen.append((x.dtype, t.tolist(), y.tolist()))
            return self.gradient(x, t, y)

        model = Conditional().bfloat16()
        sampler = Sampler(model, PROCESS, SHAPE, steps=2, guidance_scale=2.0, cond_fn=cond_fn)
        whole = sampler.sample(3, labels=[1, 2, 3])
        assert seen == [(torch.float32, [t] * 3, [1, 2, 3]) for t in (99, 0)]
        torch.testing.assert_close(sampler.sample(3, labels=[1, 2, 3], batch_size=2), whole, rtol=0, atol=0)

    @pytest.mark.parametrize("variance", ["FIXED_SMALL", "LEARNED_RANGE"])
    @pytest.mark.parametrize("proc", range(10))
    def test_openai_steps(self, proc, variance):
        golden = load("guided_gaussian")
        key = f"p{proc}"
        t, case = golden[f"{key}/t"], f"{key}/EPSILON/{variance}"
        expected = {name: golden[f"{case}/cond/{name}"] for name in ("p_sample", "ddim_sample")}
        proc = next(proc for proc in golden.meta["procs"] if proc["key"] == key)
        process = GaussianProcess(make_betas(proc["schedule"], proc["T"]), variance=variance.lower())
        process = process.respace(proc["respacing"]) if proc["respacing"] else process

        output = torch.from_numpy(golden[f"{case}/model_output"]).double()
        x, noise, y = (torch.from_numpy(golden[f"inputs/{name}"]).double() for name in ("x_t", "step_noise", "y"))
        at, labels = (values.reshape(-1, 1, 1, 1) for values in (torch.from_numpy(golden[f"{case}/model_t"]), y))
        gradient = 0.5 * torch.cos(1.3 * x + 0.01 * at) + 0.05 * labels
        rows = torch.from_numpy(process.num_timesteps - 1 - t)
        for name, options in (("p_sample", {}), ("ddim_sample", {"eta": golden.meta["etas"][1]})):
            program = build("ddim" if options else "ddpm", process, classifier=True, **options)
            sample = solver_step(x, output, program, rows, extra=gradient, noise=noise)
            # float32 there; at t = 1 its re-derived eps is a difference of nearly equal numbers (tests/solvers).
            assert error(sample.numpy(), expected[name]) < (1.5e-4 if options else 2e-6)

    def test_at_zero_terminal_snr_and_in_an_inversion(self):
        process = GaussianProcess(zero_terminal_snr(PROCESS.betas), "v")
        with pytest.raises(ValueError, match="classifier is True, but alphas_cumprod ends at 0"):
            Sampler(Unconditional(), process, SHAPE, steps=5, cond_fn=self.gradient)
        sampler = Sampler(Unconditional(), PROCESS, SHAPE, steps=5, cond_fn=self.gradient)
        with pytest.raises(ValueError, match="cond_fn must be None"):
            sampler.invert(torch.zeros(1, *SHAPE))


class TestInvert:
    IMAGES = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1

    @pytest.mark.parametrize("sigmas", [None, "karras"])
    def test_the_way_there_and_back(self, sigmas):
        """The more steps, the nearer; the latent is at the first timestep, and other solvers come back too."""

        def model(x, t):
            return 0.3 * torch.tanh(x) + 0.1 * torch.sin(x + t.reshape(-1, 1, 1, 1) / 40)

        process = GaussianProcess(linear_betas(1000))
        errors = []
        for steps in (20, 80, 320):
            sampler = Sampler(model, process, SHAPE, steps=steps, sigmas=sigmas, clip=None)
            given = self.IMAGES.clone()
            latent, t = sampler.invert(given, batch_size=2)
            assert torch.equal(given, self.IMAGES)
            assert (latent.dtype, latent.shape, t) == (torch.float32, self.IMAGES.shape, 999)
            errors.append((sampler.sample(3, start=(latent, t)) - self.IMAGES).abs().max().item())
        assert errors[0] > 3 * errors[1] > 9 * errors[2]
        other = Sampler(model, process, SHAPE, solver="dpmpp_2m", steps=320, sigmas=sigmas, clip=None)
        assert (other.sample(3, start=(latent, t)) - self.IMAGES).abs().max() < 0.05

    def test_it_starts_where_the_sampler_does(self):
        sampler = Sampler(Unconditional(), PROCESS, SHAPE, steps=10, spacing="leading")
        assert sampler.invert(self.IMAGES)[1] == 90
        sampler = Sampler(Unconditional(), FlowProcess(100), SHAPE, steps=10, spacing="trailing")
        assert sampler.invert(self.IMAGES)[1] == 99

    def test_with_labels_guidance_and_a_learned_variance(self):
        model = Conditional(learned=True)
        process = GaussianProcess(PROCESS.betas, variance="learned_range")
        sampler = Sampler(model, process, SHAPE, steps=5, guidance_scale=2.0, sigmas="karras")
        latent, _ = sampler.invert(self.IMAGES, labels=[0, 1, 2])
        assert latent.isfinite().all()
        assert model.labels[0].tolist() == [CLASSES] * 3 + [0, 1, 2]
        with pytest.raises(ValueError, match="labels must be given"):
            sampler.invert(self.IMAGES)
        with pytest.raises(ValueError, match=r"images is torch\.float32 of shape"):
            sampler.invert(self.IMAGES[0])


class TestFlow:
    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_euler(self, shift):
        """x' = x + (s' − s)·flow, from s = 1 to 0, in float64."""
        process, model = FlowProcess(1000, shift=shift), Unconditional()
        sampler = Sampler(model, process, SHAPE, steps=10, spacing="trailing", clip=None)
        u = np.linspace(1, 0, 11)
        s = shift * u / (1 + (shift - 1) * u)
        x = reference.x_T(2, SHAPE, 3)
        for i, (_, state, _) in enumerate(sampler.sample_progressive(2, seed=3)):
            with torch.no_grad():
                x = x + (s[i + 1] - s[i]) * model.evaluate(x, torch.tensor([1000 * s[i]]))
            assert error(state.numpy(), x.numpy()) < 1e-5
        np.testing.assert_allclose(times_of(model), 1000 * s[:-1], rtol=1e-6)

    @pytest.mark.parametrize("solver", FLOWING)
    @pytest.mark.parametrize("prediction", ["flow", "x0", "v"])
    def test_every_solver_with_a_perfect_network(self, prediction, solver):
        """They walk along x_s = (1−s)·x0 + s·ε to x0."""
        process = FlowProcess(1000, shift=2.0, prediction=prediction)
        x0 = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.8 - 0.9
        eps = reference.x_T(2, SHAPE, 0)

        def model(x, t):
            s = (t.double() / 1000).reshape(-1, 1, 1, 1)
            k = ((1 - s) ** 2 + s**2).sqrt()
            return {"flow": eps - x0, "x0": x0, "v": ((1 - s) * eps - s * x0) / k}[prediction].to(x.dtype)

        sampler = Sampler(model, process, SHAPE, solver=solver, steps=8)
        s = process.respace(8).sigmas[::-1]
        for row, x, shown in sampler.sample_progressive(2):
            level = s[row + 1] if row < 7 else 0.0
            if solver in reference.ONE_ROW:
                torch.testing.assert_close(x.double(), (1 - level) * x0 + level * eps, rtol=0, atol=2e-5)
            torch.testing.assert_close(shown.double(), x0, rtol=0, atol=2e-5)
        torch.testing.assert_close(x.double(), x0, rtol=0, atol=2e-5)

    def test_noise_to_and_start(self):
        process = FlowProcess(100)
        sampler = Sampler(Unconditional(), process, SHAPE, steps=10)
        x0 = torch.rand(2, *SHAPE)
        expected = 0.4 * x0 + 0.6 * philox_normal((2, *SHAPE), 9, stream=1)
        torch.testing.assert_close(sampler.noise_to(x0, 59, seed=9), expected)
        assert sampler.sample(2, start=(expected, 59)).shape == (2, *SHAPE)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"solver": "ddpm"}, "'ddpm' needs the steps of a GaussianProcess"),
            ({"sigmas": "karras"}, "a FlowProcess takes None"),
            ({"eta": 0.5}, "eta is 0.5; it must be 0 for steps whose"),
        ],
    )
    def test_what_a_flow_does_not_have(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            Sampler(Unconditional(), FlowProcess(100), SHAPE, steps=10, **kwargs)
