import itertools

import pytest
import torch
from torch import nn

from diffkern.process import GaussianProcess, cosine_betas, linear_betas
from diffkern.sampling import Sampler
from diffkern.solvers import SOLVERS, build
from tests.golden_data import error, load
from tests.sampling import reference
from tests.sampling.networks import CLASSES, Conditional, Unconditional
from tests.stub_networks import net

SHAPE = (3, 4, 6)
LABELS = [0, 3, 1, 2, 3]


def make_process(prediction="eps", variance="fixed_small"):
    return GaussianProcess(linear_betas(100), prediction, variance)


@pytest.mark.parametrize("clip", [(-1, 1), None])
@pytest.mark.parametrize(("solver", "eta"), [("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0), ("dpmpp_2m", 0.0)])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_images_are_those_of_the_papers_recurrence(variance, prediction, solver, eta, clip):
    process = make_process(prediction, variance)
    model = Unconditional(learned=variance == "learned_range")
    sampler = Sampler(model, process, SHAPE, solver=solver, steps=10, eta=eta, clip=clip)
    states = list(sampler.sample_progressive(3, seed=7))
    with torch.no_grad():
        expected = reference.sample(
            lambda x, t: model.evaluate(x, torch.tensor([t])),
            process.respace(10),
            reference.x_T(3, SHAPE, 7),
            7,
            solver=solver,
            clip=clip,
            eta=eta,
        )
    assert [row for row, _, _ in states] == list(range(10))
    for (_, x, x0), (x_ref, x0_ref) in zip(states, expected, strict=True):
        assert x.dtype == x0.dtype == torch.float32
        assert error(x.numpy(), x_ref.numpy()) < 1e-5
        # 1/√ᾱ is 220 at the first step: so much is float32's rounding of x and of the output magnified in x0.
        assert error(x0.numpy(), x0_ref.numpy()) < 5e-5
    torch.testing.assert_close(sampler.sample(3, seed=7), states[-1][1], rtol=0, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("learned", [False, True])
def test_guidance_is_that_of_the_papers_recurrence(learned, solver):
    process = make_process(variance="learned_range" if learned else "fixed_small")
    model = Conditional(learned)
    sampler = Sampler(model, process, SHAPE, solver=solver, steps=10, guidance_scale=2.5)
    labels = torch.tensor(LABELS)

    def guided(x, t):
        u, c = (model.evaluate_label(x, torch.tensor([t]), y) for y in (torch.full_like(labels, CLASSES), labels))
        return torch.cat([(u + 2.5 * (c - u))[:, : SHAPE[0]], c[:, SHAPE[0] :]], dim=1)

    x_T = reference.x_T(5, SHAPE, 1)
    with torch.no_grad():
        if solver in reference.PRINTED:
            expected = reference.sample(guided, process.respace(10), x_T, 1, solver=solver, clip=(-1, 1))
        else:
            expected = reference.run_table(guided, sampler.program, x_T, 1)
    states = list(sampler.sample_progressive(5, seed=1, labels=LABELS))
    tolerance = reference.tolerance(sampler.program)
    for (_, x, x0), (x_ref, x0_ref) in zip(states, expected, strict=True):
        assert error(x.numpy(), x_ref.numpy()) < tolerance
        # 1/√ᾱ is 220 at the first step: so much is float32's rounding of x and of the output magnified in x0.
        assert error(x0.numpy(), x0_ref.numpy()) < 5 * tolerance
    assert all(y.tolist() == [CLASSES] * 5 + LABELS for y in model.labels)


@pytest.mark.parametrize(
    "case", ["EPSILON/LEARNED_RANGE/clip1", "EPSILON/FIXED_SMALL/clip1", "START_X/FIXED_LARGE/clip0"]
)
def test_ddim_from_openai_noise_gives_openai_images(case):
    golden = load("guided_gaussian")
    prediction, variance, clip = case.split("/")
    process = GaussianProcess(
        cosine_betas(1000), {"EPSILON": "eps", "START_X": "x0"}[prediction], variance.lower()
    ).respace("ddim25")
    var = "range" if variance == "LEARNED_RANGE" else None

    def model(x, t):
        return torch.from_numpy(net(x.numpy(), t.numpy(), **{k: golden.meta["stub"][k] for k in "abw"}, var=var))

    loop = f"loops/p6/{case}/ddim_loop_eta0.0"
    kept, samples = golden[f"{loop}/kept"].tolist(), golden[f"{loop}/samples"]
    start = (torch.from_numpy(golden["loops/x_T"]), 24)
    sampler = Sampler(model, process, samples.shape[2:], steps=None, clip=(-1, 1) if clip == "clip1" else None)
    for row, x, _ in sampler.sample_progressive(2, start=start):
        if row in kept:
            assert error(x.numpy(), samples[kept.index(row)]) < 2e-5, row


def test_the_model_is_given_timesteps_of_the_original_process():
    model = Unconditional()
    process = make_process().respace("ddim50")
    Sampler(model, process, SHAPE, steps=[3]).sample(2)
    times = [t for _, t in model.calls]
    assert all(t.dtype == torch.int64 and t.shape == (2,) for t in times)
    assert [t.tolist() for t in times] == [[98, 98], [48, 48], [0, 0]]


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_depends_on_its_number_alone(solver):
    """Bitwise, since the stub is elementwise: whatever n, batch_size and the other images' labels are."""
    model = Conditional(learned=True)
    process = make_process(variance="learned_range")
    sampler = Sampler(model, process, SHAPE, solver=solver, steps=5, guidance_scale=1.5)
    whole = sampler.sample(5, seed=3, labels=LABELS)
    assert not torch.equal(whole[1], whole[4])  # the same label, another number
    for batch_size in (1, 2, 3, 5, 8):
        torch.testing.assert_close(
            sampler.sample(5, seed=3, labels=LABELS, batch_size=batch_size), whole, rtol=0, atol=0
        )
    for n in (1, 4):
        torch.testing.assert_close(sampler.sample(n, seed=3, labels=LABELS[:n]), whole[:n], rtol=0, atol=0)
    assert not torch.equal(sampler.sample(1, seed=4, labels=LABELS[:1])[0], whole[0])


def test_a_guidance_scale_of_one_is_the_conditional_output_at_half_the_cost():
    model = Conditional()
    plain = Sampler(model, make_process(), SHAPE, steps=5).sample(5, labels=LABELS)
    guided = Sampler(model, make_process(), SHAPE, steps=5, guidance_scale=1.0).sample(5, labels=LABELS)
    assert torch.equal(plain, guided)
    assert {len(x) for x, _ in model.calls} == {5}


def test_null_label():
    model = Conditional()
    Sampler(model, make_process(), SHAPE, steps=2, guidance_scale=3.0, null_label=2).sample(1, labels=[0])
    assert model.labels[0].tolist() == [2, 0]
    sampler = Sampler(model, make_process(), SHAPE, steps=2, null_label=CLASSES)
    sampler.sample(1, labels=[CLASSES])  # an image without a class
    assert model.labels[-1].tolist() == [CLASSES]


def test_a_function_may_be_the_model():
    images = Sampler(lambda x, t: torch.tanh(x), make_process("x0"), SHAPE, steps=4).sample(2)
    assert images.shape == (2, *SHAPE)
    labelled = Sampler(
        lambda x, t, y: torch.tanh(x), make_process("x0"), SHAPE, steps=4, guidance_scale=2, null_label=9
    )
    assert torch.equal(labelled.sample(2, labels=torch.tensor([100, 3])), images)


@pytest.mark.parametrize("solver", SOLVERS)
def test_image_to_image(solver):
    process = make_process()
    model = Unconditional()
    sampler = Sampler(model, process, SHAPE, solver=solver, steps="ddim10")
    x0 = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x_t = sampler.noise_to(x0, 34, seed=5)
    noise = reference.x_T(3, SHAPE, 5)
    assert (
        error(
            x_t.numpy(),
            (process.sqrt_alphas_cumprod[34] * x0 + process.sqrt_one_minus_alphas_cumprod[34] * noise).numpy(),
        )
        < 1e-6
    )

    given = x_t.clone()
    images = sampler.sample(3, seed=5, start=(x_t, 34), batch_size=2)
    assert torch.equal(given, x_t)
    program = build(solver, process, "ddim10", start=34)
    assert [t[0].item() for _, t in model.calls[: program.num_rows]] == program.times.tolist()
    if solver in reference.ONE_ROW:
        assert program.times.tolist() == [34, 30, 20, 10, 0]

    def output(x, t):
        return model.evaluate(x, torch.tensor([t]))

    with torch.no_grad():
        if solver in reference.PRINTED:
            kept = process.keep([0, 10, 20, 30, 34])
            expected = reference.sample(output, kept, x_t.double(), 5, solver=solver, clip=(-1, 1))
        else:
            expected = reference.run_table(output, program, x_t.double(), 5)
    assert error(images.numpy(), expected[-1][0].numpy()) < reference.tolerance(program)
    *_, (_, last, _) = sampler.sample_progressive(3, seed=5, start=(x_t, 34))
    assert torch.equal(last, images)


def test_start_at_a_kept_step_makes_no_further_one():
    model = Unconditional()
    sampler = Sampler(model, make_process(), SHAPE, steps="ddim10")
    sampler.sample(1, start=(torch.zeros(1, *SHAPE), 30))
    assert [t.item() for _, t in model.calls] == [30, 20, 10, 0]
    sampler.sample(1, start=(torch.zeros(1, *SHAPE), 0))
    assert [t.item() for _, t in model.calls[4:]] == [0]


def test_modes_are_restored_one_by_one():
    model = Unconditional()
    model.train()
    model.frozen = nn.Dropout().eval()
    sampler = Sampler(model, make_process(), SHAPE, steps=3)
    sampler.sample(1)
    assert model.modes == [False] * 3
    assert model.training
    assert not model.frozen.training

    progressive = sampler.sample_progressive(1)
    next(progressive)
    assert torch.is_grad_enabled()
    progressive.close()
    assert model.training

    def explode(x, t):
        raise RuntimeError("no")

    model.evaluate = explode
    with pytest.raises(RuntimeError, match="no"):
        sampler.sample(1)
    assert model.training


def test_states_are_kept_and_images_take_part_in_autograd():
    sampler = Sampler(Unconditional(), make_process(), SHAPE, steps=4)
    states = list(sampler.sample_progressive(2))
    pointers = [tensor.data_ptr() for _, x, x0 in states for tensor in (x, x0)]
    assert len(set(pointers)) == len(pointers)
    weight = torch.ones((), requires_grad=True)
    (sampler.sample(2) * weight).sum().backward()
    assert weight.grad is not None


def test_weights_say_dtype_and_memory_format():
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 3, padding=1)
            self.seen = []

        def forward(self, x, t):
            self.seen.append(x)
            return self.layer(x)

    torch.manual_seed(0)
    model = Convolution().to(memory_format=torch.channels_last)
    sampler = Sampler(model, make_process("x0"), SHAPE, steps=3)
    images = sampler.sample(2, seed=1)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in [*model.seen, images])
    model.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(sampler.sample(2, seed=1), images, rtol=1e-5, atol=1e-5)
    model.bfloat16()
    low = sampler.sample(2, seed=1)
    assert model.seen[-1].dtype == torch.bfloat16
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, images, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [SHAPE, (3, 0, 4), (1, 1, 1)])
def test_empty_batches_and_images(shape, solver):
    sampler = Sampler(Unconditional(), make_process(), shape, solver=solver, steps=3)
    assert sampler.sample(0).shape == (0, *shape)
    assert sampler.sample(2).shape == (2, *shape)


def test_beta_of_0_2_and_the_cosine_schedule_stay_finite():
    for betas, clip in itertools.product([linear_betas(1000, 1e-4, 0.2), cosine_betas(1000)], [(-1, 1), None]):
        for solver in SOLVERS:
            sampler = Sampler(
                lambda x, t: 0.5 * x, GaussianProcess(betas, "v"), (1, 2, 2), solver=solver, steps=20, clip=clip
            )
            assert sampler.sample(2).isfinite().all()


def test_progress_bar(capsys):
    Sampler(Unconditional(), make_process(), SHAPE, steps=5).sample(3, batch_size=2, progress=True)
    assert "10/10" in capsys.readouterr().err
