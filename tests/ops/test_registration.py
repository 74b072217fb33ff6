"""torch.library's promises: opcheck, fake and meta tensors, torch.func, vmap, export."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkern.ops import (
    attention,
    attention_qkv,
    channel_rms_norm,
    diffusion_loss,
    diffusion_loss_and_grad,
    dynamic_threshold,
    group_norm,
    guidance_rescale,
    linear_attention,
    philox_normal,
    philox_uint32,
    q_sample,
    solver_step,
    vb_terms,
)
from diffkern.ops._registry import OPS
from diffkern.ops.vb_terms.op import bound_arguments
from diffkern.process import GaussianProcess, linear_betas
from diffkern.process.gaussian import ProcessTables
from tests.ops import programs
from tests.ops.cases import DTYPES, in_layout, memory_format, randn, same_bits
from tests.ops.solver_calls import make
from tests.ops.test_q_sample import SIGMA, SIGNAL

X = randn(2, 4, 3, 5)
T = torch.tensor([3, 700])
TABLES = ProcessTables(SIGNAL, SIGMA)
BOUND = GaussianProcess(linear_betas(1000)).tables()
SEED, DRAW, SAMPLES = torch.tensor(5), torch.tensor(1), torch.tensor([3, 9])


def grad(*shape: int, seed: int = 0, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return in_layout(randn(*shape, seed=seed).to(dtype), layout).requires_grad_()


def step_arguments(name: str, layout: str, **replaced) -> tuple:
    call = make(programs.ALL[name], (2, 4, 3, 5), guidance=2.0)
    program = call.program
    arguments = {
        "x": in_layout(call.x, layout).requires_grad_(),
        "model_output": in_layout(call.model_output, layout).requires_grad_(),
        "table": torch.tensor(program.coefficients),
        "writes": torch.tensor(program.writes),
        "row": torch.tensor([1, 2]),
        "slots": call.slots,
        "guidance_scale": torch.tensor(2.0, dtype=torch.float64),
        "guidance_rescale": torch.tensor([0.9, 1.1], dtype=torch.float64),
        "threshold": None,
        "extra": None if call.extra is None else in_layout(call.extra, layout).requires_grad_(),
        "noise": call.noise,
        "seed": None,
        "samples": None,
        "stream": 2,
        "clip": None if program.clip is None else list(program.clip),
        "variance": ("fixed", "learned", "learned_range").index(program.variance),
        "scales_input": program.scales_input,
    }
    return tuple((arguments | replaced).values())


def loss_cases(layout: str) -> dict[str, tuple[str, tuple]]:
    shape, tables = (2, 4, 3, 5), (SIGNAL.clone().requires_grad_(), SIGMA)
    output, x0, noise = (grad(*shape, seed=seed, layout=layout) for seed in range(3))
    weight, counter = randn(2, seed=3).requires_grad_(), (SEED, DRAW, SAMPLES, 3)
    found = {
        f"diffusion_loss eps {layout}": (output, None, T, *tables, weight, noise, None, None, None, 3, "eps"),
        f"diffusion_loss x0 {layout}": (output, x0, T, *tables, None, None, None, None, None, 3, "x0"),
        f"diffusion_loss v {layout}": (output, x0, T, *tables, weight, None, *counter, "v"),
    }
    plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in found[f"diffusion_loss v {layout}"])
    scales = {"": torch.tensor(0.5).double(), " per sample": torch.tensor([0.5, 2.0]).double()}
    one_pass = {f"diffusion_loss_and_grad{name} {layout}": (*plain, scale) for name, scale in scales.items()}
    return {case: (case.split()[0], arguments) for case, arguments in (found | one_pass).items()}


def bound_cases(layout: str) -> dict[str, tuple[str, tuple]]:
    counter = {"noise": None, "seed": SEED, "draw": DRAW, "samples": SAMPLES, "stream": 3, "generator": None}
    common = {"levels": 17, "stops_mean": False} | counter
    x0, noise, doubled = (
        grad(*shape, seed=k, layout=layout) for k, shape in enumerate([(2, 4, 3, 5), (2, 4, 3, 5), (2, 8, 3, 5)])
    )
    tables = BOUND._replace(posterior_mean_coef1=BOUND.posterior_mean_coef1.clone().requires_grad_())
    given = common | {"noise": noise, "seed": None, "y": "x_t"}
    calls = {
        f"vb_terms eps {layout}": bound_arguments(x0, noise, T, tables, target="eps", variance="fixed_large", **common),
        f"vb_terms v {layout}": bound_arguments(
            doubled, x0, T, tables, target="v", variance="learned_range", decoder="exact", clip=(-1.0, 1.0), **given
        ),
    }
    plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in calls[f"vb_terms v {layout}"])
    scales = {"": torch.tensor([0.5, 2.0, 0.0]).double(), " per sample": torch.ones(2, 3).double()}
    one_pass = {f"vb_terms_and_grad{name} {layout}": (*plain, scale) for name, scale in scales.items()}
    return {case: (case.split()[0], arguments) for case, arguments in (calls | one_pass).items()}


def cases() -> dict[str, tuple[str, tuple]]:
    found = {
        "uint32": ("philox_uint32", ([2, 3, 5], SEED, DRAW, SAMPLES, 0)),
        "normal": ("philox_normal", ([2, 3, 5, 3], SEED, DRAW, SAMPLES, 0, torch.bfloat16, True)),
        "normal double": ("philox_normal", ([2, 3, 5], SEED, DRAW, torch.tensor(4), 0, torch.float64, False)),
        "sizes": ("philox_normal", ([0, 3, 5], SEED, DRAW, torch.tensor(4), 0, torch.float32, False)),
    }
    for layout in ("contiguous", "channels_last", "sliced"):
        x, tables = grad(2, 4, 3, 5, layout=layout), (SIGNAL.clone().requires_grad_(), SIGMA)
        found[f"q_sample given {layout}"] = (
            "q_sample",
            (x, T, *tables, grad(2, 4, 3, 5, seed=1), None, None, None, 3, False),
        )
        found[f"q_sample counter {layout}"] = ("q_sample", (x, T, *tables, None, SEED, DRAW, SAMPLES, 3, True))
        found |= loss_cases(layout) | bound_cases(layout)
        for name in programs.ALL:
            threshold = torch.tensor([1.2, 1.7], dtype=torch.float64) if name == "threshold" else None
            found[f"solver_step {name} {layout}"] = ("solver_step", step_arguments(name, layout, threshold=threshold))
        output, program = grad(4, 4, 3, 5, seed=1, layout=layout), programs.THRESHOLD
        scale, rescale = torch.tensor(2.0).double(), torch.tensor([0.9, 1.1]).double().requires_grad_()
        table = torch.tensor(program.coefficients)
        found[f"guidance_rescale {layout}"] = ("guidance_rescale", (output, scale, 0.7))
        arguments = (x, grad(2, 4, 3, 5, seed=1), table, torch.tensor(1), None, None, 0.9, 2.0)
        found[f"dynamic_threshold {layout}"] = ("dynamic_threshold", arguments)
        arguments = (x, output, table, torch.tensor([1, 2]), scale, rescale, 0.9, 30.0)
        found[f"dynamic_threshold guided {layout}"] = ("dynamic_threshold", arguments)
        counter = {"noise": None, "seed": SEED, "samples": SAMPLES}
        found[f"solver_step counter {layout}"] = ("solver_step", step_arguments("learned", layout, **counter))
        for dtype in (torch.float32, torch.bfloat16):
            x = grad(2, 4, 3, 5, layout=layout, dtype=dtype)
            weight, bias, scale, shift = grad(4, seed=1), grad(4, seed=2), grad(2, 4, seed=3), grad(2, 4, seed=4)
            found[f"group_norm {layout} {dtype}"] = ("group_norm", (x, 2, weight, bias, 1e-5, scale, shift, True))
            found[f"group_norm plain {layout} {dtype}"] = ("group_norm", (x, 4, None, None, 1e-5, None, None, False))
            for name, arguments in {
                "": (weight, 1e-12, scale, shift, True),
                " plain": (None, 1e-5, None, None, False),
            }.items():
                found[f"channel_rms_norm{name} {layout} {dtype}"] = ("channel_rms_norm", (x, *arguments))
            qkv, memory = grad(2, 12, 5, layout=layout, dtype=dtype), grad(2, 2, 2, 3)
            found[f"linear_attention {layout} {dtype}"] = ("linear_attention", (qkv, memory, 2, 0.7, False))
            found[f"linear_attention plain {layout} {dtype}"] = ("linear_attention", (qkv, None, 1, 0.7, False))
            skip, offset = grad(2, 2, 3, 5, seed=5, dtype=dtype), grad(2, 6, seed=6)
            arguments = (x, 2, None, None, 1e-5, None, None, True, skip, offset)
            found[f"group_norm skip {layout} {dtype}"] = ("group_norm", arguments)
    for layout in ("contiguous", "channels_last"):
        q, k = grad(2, 5, 12, layout=layout), grad(2, 7, 12, seed=1, layout=layout)
        found[f"attention {layout}"] = ("attention", (q, k, k, 3, 0.5, True, True))
        found[f"attention planes {layout}"] = ("attention", (q, q, q, 1, 0.5, False, True))
        for order in ("hqkvc", "qkvhc", "hcqkv"):
            for channels_last in (False, True):
                arguments = (grad(2, 12, 12, layout=layout), 2, order, 0.5, channels_last, True)
                found[f"attention_qkv {order} {channels_last} {layout}"] = ("attention_qkv", arguments)
    q, k, rows = randn(2, 5, 12), randn(2, 7, 12, seed=1), randn(2, 2, 3, 5)
    found["attention_backward"] = ("attention_backward", (q, q, k, k, q, rows, 3, 0.5, True))
    arguments = (q, randn(2, 5, 36), q, rows, 3, "hcqkv", 0.5, True)
    found["attention_qkv_backward"] = ("attention_qkv_backward", arguments)
    of_group_norm = (X, X, randn(4), randn(4), None, None, torch.zeros(2, 2), torch.ones(2, 2), 2, True)
    found["group_norm_backward"] = ("group_norm_backward", of_group_norm)
    backward = (X, X, randn(4), 1e-12, randn(2, 4), None, X.norm(dim=1, keepdim=True), True)
    found["channel_rms_norm_backward"] = ("channel_rms_norm_backward", backward)
    rows, sums = randn(2, 12, 5), torch.ones(2, 2, 2)
    backward = (randn(2, 4, 5), rows, randn(2, 2, 2, 3), torch.ones(2, 2, 2, 2), sums, sums.clone(), 2, 0.7, False)
    found["linear_attention_backward"] = ("linear_attention_backward", backward)
    parts = (X[:, :1].clone(), *of_group_norm[2:], in_layout(X[:, 1:], "channels_last"), randn(2, 4))
    found["group_norm_backward skip"] = ("group_norm_backward", (X, *parts))
    return found


CASES = cases()
TRACED = {name: case for case, (name, _) in CASES.items() if not case.endswith(("contiguous", "sliced"))}  # one an op


def test_every_op_has_a_case():
    assert {name for name, _ in CASES.values()} == set(OPS)


@pytest.mark.parametrize("case", CASES)
def test_opcheck(backend, case):
    """Schema (nothing mutated or aliased that is not marked), fake against real, autograd registration, AOT dispatch.

    The last is slow and for one form of each op: test_contract_modes.py compiles the others.
    """
    name, arguments = CASES[case]
    if backend == "triton" and case == "normal double":
        pytest.skip("float64 is the reference's, and what is registered runs the backend that is asked for")
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if backend == "native" and case == TRACED[name]:
        utilities.append("test_aot_dispatch_dynamic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(getattr(torch.ops.diffkern, name).default, arguments, test_utils=utilities)


def on(device: torch.device) -> ProcessTables:
    return ProcessTables(SIGNAL.to(device), SIGMA.to(device))


def bound_on(device: torch.device) -> ProcessTables:
    return GaussianProcess(linear_betas(1000)).tables(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "broadcast"])
def test_meta_and_fake_tensors_foretell_the_result(layout, dtype):
    """Shape, dtype and strides of the public functions, without data."""
    x = in_layout(X.to(dtype), layout)
    functions = [
        lambda x: attention(x[:, 0], x[:, 1], x[:, 2], 1),
        lambda x: attention_qkv(x[:, 0], 1, channels_last=False),
        lambda x: attention_qkv(x.flatten(2).repeat(1, 1, 2), 5, order="hcqkv", channels_last=True),
        lambda x: group_norm(x, 2, activation="silu"),
        lambda x: channel_rms_norm(x, activation="silu"),
        lambda x: linear_attention(x.repeat(1, 3, 1, 1).flatten(2), 2),
        lambda x: q_sample(x, T.to(x.device), SIGNAL.to(x.device), SIGMA.to(x.device), seed=1),
        lambda x: solver_step(x, x, programs.PLAIN, 0, seed=1),
        lambda x: guidance_rescale(x, 2.0, 0.5),
        lambda x: dynamic_threshold(x, x, programs.THRESHOLD, 0),
        lambda x: diffusion_loss(x, x, T.to(x.device), on(x.device), seed=1),
        lambda x: diffusion_loss_and_grad(x, x, T.to(x.device), on(x.device), scale=0.5, seed=1)[1],
        lambda x: vb_terms(x, x, T.to(x.device), bound_on(x.device), seed=1).vb,
        lambda x: diffusion_loss_and_grad(
            x, x[:, :2], T.to(x.device), bound_on(x.device), scale=0.5, loss="hybrid", variance="learned", seed=1
        )[1],
    ]
    for function in functions:
        real = function(x)
        meta = function(x.to("meta"))
        assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")
        with FakeTensorMode(allow_non_fake_inputs=True):
            foretold = function(torch.empty_strided(x.shape, x.stride(), dtype=dtype))
        assert (foretold.shape, foretold.dtype, foretold.stride()) == (real.shape, real.dtype, real.stride())


def test_a_fake_mode_or_transform_leaves_nothing_behind(backend):
    """What is cached per program belongs to the mode that made it; real calls come before, between and after."""
    x, output = X, randn(2, 4, 3, 5, seed=1)
    expected = None
    for first in ("fake", "transform"):
        program = programs.program(1, zero=("c_e", "c_v", "s"))
        if first == "fake":
            with FakeTensorMode():
                solver_step(torch.empty(2, 4, 3, 5), torch.empty(2, 4, 3, 5), program, 0, seed=77)
        else:
            torch.func.grad(lambda x, p=program: solver_step(x, output, p, 0, seed=77).sum())(x)
        found = solver_step(x, output, program, 0, seed=77)
        assert type(found) is torch.Tensor
        expected = found if expected is None else expected
        assert same_bits(found, expected)


class Everything(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        x_t = q_sample(x, t, SIGNAL, SIGMA, seed=seed)
        y = group_norm(channel_rms_norm(x_t), 2, activation="silu")
        y = y + attention_qkv(y.flatten(2).repeat(1, 3, 1), 2).unflatten(2, x.shape[2:])
        z = philox_normal((2, 4, 3, 5), seed, stream=5)
        loss, slope = diffusion_loss_and_grad(y, x, t, TABLES, scale=0.5, target="v", seed=seed)
        y = y - slope * diffusion_loss(y, x, t, TABLES, weight=loss, seed=seed)[:, None, None, None]
        both = torch.cat([x_t, y])
        x_next = solver_step(y + z, x_t, programs.CLIPPED, torch.tensor(1), seed=seed, extra=z)
        options = {"guidance_scale": 2.0, "guidance_rescale": 0.5}
        return solver_step(x_next, both, programs.THRESHOLD, torch.tensor(2), seed=seed, **options)[0]


@pytest.mark.parametrize("strict", [False, True])
def test_export(backend, strict):
    module, arguments = Everything(), (X, T, SEED)
    exported = torch.export.export(module, arguments, strict=strict)
    again = (randn(2, 4, 3, 5, seed=8), torch.tensor([999, 0]), torch.tensor(-1))
    assert same_bits(exported.module()(*again), module(*again))


def test_strides_survive_a_round_trip(backend):
    """channels_last in, channels_last out, through all ops in a row."""
    assert memory_format(Everything()(in_layout(X, "channels_last"), T, SEED)) == "channels_last"


def test_integers_have_no_gradient(backend):
    assert not philox_uint32((2, 3), SEED).requires_grad
    assert not philox_normal((2, 3), SEED).requires_grad
