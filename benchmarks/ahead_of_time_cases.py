"""The calls whose Triton kernels are compiled ahead of time: each op, in the shapes that diffusion U-Nets have.

A case is a call of an op on empty tensors of real size (nothing is computed). `main` are the ones that the tests
compile; the others make the product of dtypes, memory formats and forms whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern import ops
from diffkern.process import GaussianProcess, linear_betas
from diffkern.solvers import build

STORAGE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# States of 32² and 256² pixels; with 31² pixels the generated noise does not fall into fours in channels last.
STATES = [(256, 3, 32, 32), (16, 3, 256, 256), (256, 3, 31, 31)]
# The norms of DDPM's CIFAR-10 network and of guided-diffusion's at 64² and 256² pixels, and a batch of one.
NORMS = [
    (256, 128, 32, 32),
    (256, 256, 16, 16),
    (256, 256, 8, 8),
    (64, 192, 64, 64),
    (64, 384, 32, 32),
    (16, 256, 256, 256),
    (1, 128, 32, 32),
    (8, 1344, 16, 16),
    (8, 1568, 8, 8),
]
# (batch, heads, queries, channels of a head, keys if they are not the queries' own) of attention in UNet2DModel, Stable
# Diffusion with its text, improved- and guided-diffusion and DDPM, in a batch of one, and of odd numbers.
ATTENTION = [
    (64, 32, 256, 8, None),
    (8, 4, 256, 32, 260),
    (8, 8, 4096, 40, None),
    (8, 8, 4096, 40, 77),
    (64, 9, 256, 64, None),
    (16, 6, 1024, 64, None),
    (1, 6, 1024, 64, None),
    (2, 2, 300, 65, None),
    (8, 8, 1024, 80, None),
    (64, 4, 256, 96, None),
    (16, 4, 1024, 128, None),
    (8, 8, 256, 160, None),
    (16, 4, 256, 192, None),
    (64, 1, 256, 256, None),
    (16, 1, 256, 512, None),
]
# Of which the tests compile the backward pass too.
ATTENTION_MAIN = {"bfloat16": (8, 40, 64, 128, 192, 256, 512), "float32": (64, 256, 512)}


# (B, heads, d, T) of denoising-diffusion-pytorch's linear attention, and wider heads.
LINEAR_ATTENTIONS = [(64, 4, 32, 1024), (16, 4, 32, 16384), (1, 4, 32, 4096), (64, 4, 64, 256)]


class Case(NamedTuple):
    """bytes_per_element: the least that is read and written, for each element of the first tensor."""

    op: str
    name: str
    bytes_per_element: float
    main: bool
    call: Callable[[], Any]


def empty(shape: tuple[int, ...], dtype: torch.dtype, memory_format: str = "contiguous") -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=FORMATS[memory_format])


def text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def cases() -> Iterator[Case]:
    yield from noise()
    yield from steps()
    yield from losses()
    yield from norms()
    yield from attentions()
    yield from linear_attentions()


def noise() -> Iterator[Case]:
    process = GaussianProcess(linear_betas(1000)).tables()
    tables = (process.sqrt_alphas_cumprod, process.sqrt_one_minus_alphas_cumprod)
    yield Case("philox_uint32", text(STATES[0]), 8, True, lambda: ops.philox_uint32(STATES[0], 1))
    for shape, dtype, memory_format in itertools.product(STATES, STORAGE, FORMATS):
        size, main = STORAGE[dtype].itemsize, memory_format == "contiguous" or dtype != "float16"
        name = f"{text(shape)}, {dtype}, {memory_format}"
        options = {"dtype": STORAGE[dtype], "memory_format": FORMATS[memory_format]}
        yield Case("philox_normal", name, size, main, lambda s=shape, o=options: ops.philox_normal(s, 1, **o))
        x0, t = empty(shape, STORAGE[dtype], memory_format), torch.zeros(shape[0], dtype=torch.int64)

        def noised(x0=x0, t=t, **source):
            return ops.q_sample(x0, t, *tables, **source)

        yield Case("q_sample", f"{name}, counter", 2 * size, main, lambda f=noised: f(seed=1))
        main = shape == STATES[1] and memory_format == "contiguous"
        yield Case("q_sample", f"{name}, noise given", 3 * size, main, lambda f=noised, x=x0: f(noise=x))
        with_noise = lambda f=noised: f(seed=1, return_noise=True)  # noqa: E731
        yield Case("q_sample", f"{name}, counter, ε returned", 3 * size, main, with_noise)


def steps() -> Iterator[Case]:
    process = GaussianProcess(linear_betas(1000))
    learned = GaussianProcess(linear_betas(1000), variance="learned_range")
    programs = {
        "ddpm": (build("ddpm", process, clip=(-1.0, 1.0)), 3, {"seed": 1}),
        "ddpm, learned range": (build("ddpm", learned, clip=(-1.0, 1.0)), 4, {"seed": 1}),
        "ddim": (build("ddim", process, steps=50), 3, {}),
        "dpm++ 2m": (build("dpmpp_2m", process, steps=20), 5, {}),
    }
    for (name, (program, tensors, source)), shape, dtype in itertools.product(programs.items(), STATES[:2], STORAGE):
        for memory_format, guided in itertools.product(FORMATS, (False, True)):
            x = empty(shape, STORAGE[dtype], memory_format)
            channels = shape[1] * (2 if "learned" in name else 1)
            output = empty((shape[0] * (2 if guided else 1), channels, *shape[2:]), STORAGE[dtype], memory_format)
            slots = [torch.empty_like(x) for _ in range(program.num_slots)] or None
            options = source | ({"guidance_scale": 2.0} if guided else {})

            def stepped(x=x, output=output, program=program, slots=slots, options=options):
                return ops.solver_step(x, output, program, 3, slots=slots, **options)

            main = shape == STATES[0] and memory_format == "contiguous" and dtype != "float16"
            moved = (tensors + guided) * STORAGE[dtype].itemsize
            described = f"{name}, {text(shape)}, {dtype}, {memory_format}" + (", guided" if guided else "")
            yield Case("solver_step", described, moved, main, stepped)
    threshold = build("ddim", process, steps=50, threshold=(0.995, 1.5))
    for shape, dtype in itertools.product(STATES[:2], STORAGE):
        x, doubled = empty(shape, STORAGE[dtype]), empty((2 * shape[0], *shape[1:]), STORAGE[dtype])
        name, main = f"{text(shape)}, {dtype}", shape == STATES[0] and dtype != "float16"
        size = STORAGE[dtype].itemsize
        yield Case(
            "dynamic_threshold",
            name,
            2 * size,
            main,
            lambda x=x: ops.dynamic_threshold(x, x, threshold, torch.tensor(3)),
        )
        scale = torch.tensor(2.0, dtype=torch.float64)
        call = lambda d=doubled, s=scale: ops.guidance_rescale(d, s, 0.7)  # noqa: E731
        yield Case("guidance_rescale", name, 2 * size, main, call)


def losses() -> Iterator[Case]:
    process = GaussianProcess(linear_betas(1000))
    tables = process.tables()
    for shape, dtype, memory_format in itertools.product(STATES[:2], STORAGE, FORMATS):
        size, main = STORAGE[dtype].itemsize, memory_format == "contiguous" and dtype != "float16"
        output, x0 = (empty(shape, STORAGE[dtype], memory_format) for _ in range(2))
        doubled = empty((shape[0], 2 * shape[1], *shape[2:]), STORAGE[dtype], memory_format)
        t = torch.zeros(shape[0], dtype=torch.int64)
        name = f"{text(shape)}, {dtype}, {memory_format}"

        def loss(output=output, x0=x0, t=t, **options):
            return ops.diffusion_loss(output, x0, t, tables, **options)

        def with_gradient(output=output, x0=x0, t=t, **options):
            return ops.diffusion_loss_and_grad(output, x0, t, tables, scale=1.0, **options)

        yield Case("diffusion_loss", f"{name}, ε given", 2 * size, main, lambda f=loss, x=x0: f(noise=x))
        call = lambda f=with_gradient: f(seed=1)  # noqa: E731
        yield Case("diffusion_loss_and_grad", f"{name}, ε regenerated", 2 * size, main, call)
        call = lambda f=with_gradient: f(seed=1, target="v")  # noqa: E731
        yield Case("diffusion_loss_and_grad", f"{name}, v regenerated", 3 * size, main, call)
        hybrid = {"loss": "hybrid", "variance": "learned_range", "seed": 1}
        call = lambda f=with_gradient, d=doubled, o=hybrid: f(output=d, **o)  # noqa: E731
        yield Case("vb_terms_and_grad", f"{name}, hybrid", 5 * size, main, call)
        for decoder in ("tanh", "exact"):

            def bound(output=output, x0=x0, t=t, decoder=decoder):
                options = {"variance": "fixed_large", "decoder": decoder, "seed": 1}
                return ops.vb_terms(output, x0, t, tables, **options)

            yield Case("vb_terms", f"{name}, {decoder}", 2 * size, main, bound)


def norms() -> Iterator[Case]:
    for shape, dtype, memory_format in itertools.product(NORMS, STORAGE, FORMATS):
        size, channels = STORAGE[dtype].itemsize, shape[1]
        x = empty(shape, STORAGE[dtype], memory_format)
        weight, projection = torch.empty(channels), torch.empty(shape[0], 2 * channels)
        scale, shift = projection.chunk(2, 1)
        name = f"{text(shape)}, {dtype}, {memory_format}"
        main = (dtype, memory_format) in (("bfloat16", "channels_last"), ("float32", "contiguous"))
        for op, plain, scaled in (
            ("group_norm", (x, 32, weight, weight), {"scale": scale, "shift": shift}),
            ("channel_rms_norm", (x, weight), {"scale": scale, "shift": shift}),
        ):
            function = getattr(ops, op)

            def forward(f=function, a=plain, **options):
                return f(*a, activation="silu", **options)

            def backward(f=function, a=plain, **options):
                leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in a]
                y = f(*leaves, activation="silu", **options)
                torch.autograd.grad(y, [t for t in leaves if isinstance(t, Tensor)], torch.empty_like(a[0]))

            yield Case(op, f"{name}, SiLU", 2 * size, main, forward)
            yield Case(op, f"{name}, SiLU, scale-shift", 2 * size, False, lambda f=forward, s=scaled: f(**s))
            yield Case(f"{op}_backward", f"{name}, SiLU", 3 * size, main, backward)
            call = lambda f=backward, s=scaled: f(**s)  # noqa: E731
            yield Case(f"{op}_backward", f"{name}, SiLU, scale-shift", 3 * size, False, call)


def attentions() -> Iterator[Case]:
    for (samples, heads, queries, head, keys), dtype in itertools.product(ATTENTION, STORAGE):
        size, channels = STORAGE[dtype].itemsize, heads * head
        for layout in ("channels first", "channels last"):
            if keys is not None and layout == "channels first":
                continue
            shape = (samples, queries, 3 * channels) if layout == "channels last" else (samples, 3 * channels, queries)
            qkv = torch.empty(shape, dtype=STORAGE[dtype], requires_grad=True)
            q = torch.empty(samples, queries, channels, dtype=STORAGE[dtype], requires_grad=True)
            kv = torch.empty(samples, keys or 1, channels, dtype=STORAGE[dtype], requires_grad=True)

            def attended(q=q, kv=kv, qkv=qkv, heads=heads, alone=keys is None, last=layout == "channels last"):
                if alone:
                    return ops.attention_qkv(qkv, heads, channels_last=last)
                return ops.attention(q, kv, kv, heads)

            def forward(f=attended):
                with torch.no_grad():
                    f()

            def backward(f=attended, inputs=(qkv,) if keys is None else (q, kv)):
                out = f()
                torch.autograd.grad(out, inputs, torch.empty_like(out))

            name = f"{samples}×{heads} heads, {queries}×{keys or queries}, d = {head}, {dtype}, {layout}"
            compiled = dtype == "bfloat16" or (dtype == "float32" and head in (8, 64, 128, 256, 512) and samples > 1)
            main = compiled and layout == "channels last"
            differentiated = main and head in ATTENTION_MAIN[dtype] and keys is None and samples > 1 and queries != 1024
            differentiated |= main and head == 128 and dtype == "bfloat16"
            yield Case("attention", name, 4 * size, main and not differentiated, forward)
            yield Case("attention_backward", name, 8 * size, differentiated, backward)


def linear_attentions() -> Iterator[Case]:
    for shape, dtype, channels_last in itertools.product(LINEAR_ATTENTIONS, STORAGE, (False, True)):
        samples, heads, d, length = shape
        packed = (samples, length, 3 * heads * d) if channels_last else (samples, 3 * heads * d, length)
        qkv, memory = torch.empty(packed, dtype=STORAGE[dtype]), torch.empty(2, heads, d, 4)
        name = f"{text(shape)}, {dtype}, {'channels_last' if channels_last else 'contiguous'}"
        main = d == 32 and (dtype, channels_last) in (("bfloat16", True), ("float32", False))
        size = STORAGE[dtype].itemsize

        def forward(qkv=qkv, memory=memory, heads=heads, channels_last=channels_last):
            return ops.linear_attention(qkv, heads, memory=memory, channels_last=channels_last)

        def backward(qkv=qkv, memory=memory, call=forward):
            leaves = [t.detach().requires_grad_() for t in (qkv, memory)]
            out = call(*leaves)
            torch.autograd.grad(out, leaves, torch.empty_like(out))

        yield Case("linear_attention", f"{name}, memory", 4 / 3 * size, main, forward)
        call = lambda f=forward: f(memory=None)  # noqa: E731
        yield Case("linear_attention", name, 4 / 3 * size, False, call)
        yield Case("linear_attention_backward", f"{name}, memory", 7 / 3 * size, main, backward)
