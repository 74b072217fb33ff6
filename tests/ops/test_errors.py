"""A bad argument raises an error that names it, before anything is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffkern.backends import use_backend
from diffkern.ops import (
    attention,
    attention_qkv,
    channel_rms_norm,
    diffusion_loss,
    diffusion_loss_and_grad,
    group_norm,
    linear_attention,
    philox_normal,
    philox_uint32,
    q_sample,
    solver_step,
    vb_terms,
)
from diffkern.process import GaussianProcess, linear_betas
from diffkern.process.gaussian import ProcessTables
from tests.ops import programs
from tests.ops.cases import Untouched, randn
from tests.ops.test_q_sample import SIGMA, SIGNAL

X = randn(2, 4, 3, 5)
META = torch.empty(2, 4, 3, 5, device="meta")
INTEGERS = torch.zeros(2, 4, 3, 5, dtype=torch.int64)
SPARSE = X.to_sparse()
Mistake = tuple[dict, type[Exception], str]

NOISE: list[Mistake] = [
    ({"seed": -1}, ValueError, "seed"),
    ({"seed": 2**64}, ValueError, "seed"),
    ({"seed": True}, TypeError, "seed"),
    ({"seed": 1.0}, TypeError, "seed"),
    ({"seed": "1"}, TypeError, "seed"),
    ({"seed": torch.tensor(1.0)}, TypeError, "seed"),
    ({"seed": torch.tensor(1, dtype=torch.int32)}, TypeError, "seed"),
    ({"seed": torch.tensor([1])}, ValueError, "seed"),
    ({"samples": -1}, ValueError, "samples"),
    ({"samples": 1.0}, TypeError, "samples"),
    ({"samples": True}, TypeError, "samples"),
    ({"samples": torch.zeros(3, dtype=torch.int64)}, ValueError, "samples"),
    ({"samples": torch.zeros(2)}, TypeError, "samples"),
    ({"samples": [0, 1]}, TypeError, "samples"),
    ({"stream": -1}, ValueError, "stream"),
    ({"stream": 2**16}, ValueError, "stream"),
    ({"stream": 1.0}, ValueError, "stream"),
]
DRAW: list[Mistake] = [
    ({"draw": -1}, ValueError, "draw"),
    ({"draw": 0.5}, TypeError, "draw"),
    ({"draw": False}, TypeError, "draw"),
    ({"draw": torch.zeros(2, dtype=torch.int64)}, ValueError, "draw"),
]
SOURCES: list[Mistake] = [
    ({"noise": X}, ValueError, "exactly one of noise, seed and generator"),
    ({"seed": None}, ValueError, "exactly one of noise, seed and generator"),
    ({"generator": torch.Generator()}, ValueError, "exactly one of noise, seed and generator"),
    ({"seed": None, "noise": X[:1]}, ValueError, "noise"),
    ({"seed": None, "noise": META}, ValueError, "noise"),
    ({"seed": None, "noise": INTEGERS}, TypeError, "noise"),
    ({"seed": None, "noise": 0.0}, TypeError, "noise"),
    ({"seed": None, "generator": 5}, TypeError, "generator"),
    ({"seed": torch.tensor(1, device="meta")}, ValueError, "seed"),
    ({"samples": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "samples"),
]
PHILOX: list[Mistake] = [
    ({"shape": ()}, ValueError, "shape"),
    ({"shape": (2, -1)}, ValueError, "shape"),
    ({"shape": 5}, TypeError, "shape"),
    ({"shape": (2, 1.5)}, TypeError, "shape"),
    ({"draw": torch.tensor(0, device="meta")}, ValueError, "draw"),
    *NOISE,
    *DRAW,
]
NORMAL: list[Mistake] = [
    ({"dtype": torch.int64}, TypeError, "dtype"),
    ({"dtype": torch.complex64}, TypeError, "dtype"),
    ({"dtype": "float32"}, TypeError, "dtype"),
    ({"memory_format": torch.channels_last}, ValueError, "memory_format"),
    ({"memory_format": torch.preserve_format}, ValueError, "memory_format"),
]
T = torch.tensor([0, 999])
Q_SAMPLE: list[Mistake] = [
    ({"x0": INTEGERS}, TypeError, "x0"),
    ({"x0": X.to(torch.complex64)}, TypeError, "x0"),
    ({"x0": torch.tensor(1.0)}, ValueError, "x0"),
    ({"x0": X.numpy()}, TypeError, "x0"),
    ({"x0": SPARSE}, TypeError, "x0"),
    ({"x0": META}, ValueError, "t must be on x0's device"),
    ({"t": torch.tensor([0.0, 1.0])}, TypeError, "t must be int64"),
    ({"t": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "t must be int64"),
    ({"t": 3}, TypeError, "t must be"),
    ({"t": torch.tensor(3)}, ValueError, "t must have shape"),
    ({"t": torch.tensor([1, 2, 3])}, ValueError, "t must have shape"),
    ({"t": T.to("meta")}, ValueError, "t must be on"),
    ({"t": torch.tensor([0, 1000])}, ValueError, r"t must lie in \[0, 1000\), got 1000 at position 1"),
    ({"t": torch.tensor([-1, 0])}, ValueError, r"t must lie in \[0, 1000\), got -1 at position 0"),
    ({"t": torch.tensor([2**62, 0])}, ValueError, "t must lie in"),
    ({"sqrt_alphas_cumprod": SIGNAL[:-1]}, ValueError, "sqrt_alphas_cumprod"),
    ({"sqrt_alphas_cumprod": SIGNAL.half()}, TypeError, "sqrt_alphas_cumprod"),
    ({"sqrt_alphas_cumprod": SIGNAL.numpy()}, TypeError, "sqrt_alphas_cumprod"),
    ({"sqrt_alphas_cumprod": SIGNAL.to("meta")}, ValueError, "sqrt_alphas_cumprod"),
    ({"sqrt_alphas_cumprod": SIGNAL[:0]}, ValueError, "sqrt_alphas_cumprod"),
    ({"sqrt_one_minus_alphas_cumprod": SIGMA.reshape(10, 100)}, ValueError, "sqrt_one_minus_alphas_cumprod"),
    *NOISE,
    *DRAW,
    *SOURCES,
]
GUIDED = {"guidance_scale": 2.0, "model_output": torch.cat([X, X])}
LEARNED = {"program": programs.LEARNED, "extra": X}
SLOTTED = {"program": programs.MULTISTEP}
SOLVER_STEP: list[Mistake] = [
    ({"x": INTEGERS}, TypeError, "x must be"),
    ({"x": META}, ValueError, "must be on x's device"),
    ({"x": torch.zeros(2), "model_output": torch.zeros(4), **LEARNED}, ValueError, "x must have a channel axis"),
    ({"model_output": X[:1]}, ValueError, "model_output"),
    ({"model_output": torch.cat([X, X])}, ValueError, "model_output"),
    ({"model_output": META}, ValueError, "model_output"),
    ({"model_output": INTEGERS}, TypeError, "model_output"),
    ({**LEARNED}, ValueError, "model_output must have shape .* learned variance"),
    ({"guidance_scale": 2.0}, ValueError, "model_output must have shape .* guidance"),
    ({**GUIDED, "guidance_scale": "2"}, TypeError, "guidance_scale"),
    ({**GUIDED, "guidance_scale": [2.0]}, TypeError, "guidance_scale"),
    ({**GUIDED, "guidance_scale": torch.ones(3)}, ValueError, "guidance_scale"),
    ({**GUIDED, "guidance_scale": torch.ones((), device="meta")}, ValueError, "guidance_scale"),
    ({**GUIDED, "guidance_rescale": 1.5}, ValueError, "guidance_rescale"),
    ({**GUIDED, "guidance_rescale": "0.5"}, TypeError, "guidance_rescale"),
    ({"guidance_rescale": 0.5}, ValueError, "guidance_rescale"),
    ({"row": 3}, ValueError, r"row must lie in \[0, 3\), got 3"),
    ({"row": -1}, ValueError, "row must lie in"),
    ({"row": True}, TypeError, "row must be"),
    ({"row": 1.0}, TypeError, "row must be"),
    ({"row": torch.tensor(1.0)}, TypeError, "row must be int64"),
    ({"row": torch.zeros(3, dtype=torch.int64)}, ValueError, "row must have shape"),
    ({"row": torch.tensor(0, device="meta")}, ValueError, "row must be on"),
    ({"row": torch.tensor(3)}, ValueError, r"row must lie in \[0, 3\), got 3"),
    ({"row": torch.tensor([0, -5])}, ValueError, r"row must lie in \[0, 3\), got -5 at position 1"),
    ({"slots": torch.zeros(1, 2, 4, 3, 5)}, ValueError, "slots must be None"),
    ({**SLOTTED}, ValueError, "slots must be given"),
    ({**SLOTTED, "slots": torch.zeros(2, 2, 4, 3, 5)}, ValueError, "slots must have shape"),
    ({**SLOTTED, "slots": torch.zeros(3, 2, 4, 3, 5, dtype=torch.float64)}, TypeError, "slots must have x's dtype"),
    ({**SLOTTED, "slots": torch.zeros(3, 2, 4, 3, 5, device="meta")}, ValueError, "slots must be on"),
    ({"out": torch.zeros(2, 4, 3, 6)}, ValueError, "out must have shape"),
    ({"out": X.double()}, TypeError, "out must have x's dtype"),
    ({"out": META}, ValueError, "out must be on"),
    ({"out": [0.0]}, TypeError, "out must be a tensor"),
    ({"extra": X[:1]}, ValueError, "extra"),
    ({"extra": INTEGERS}, TypeError, "extra"),
    *NOISE,
    *SOURCES,
]
GROUP_NORM: list[Mistake] = [
    ({"x": INTEGERS}, TypeError, "x must be"),
    ({"x": torch.zeros(3)}, ValueError, "x must have at least 2 dimensions"),
    ({"x": SPARSE}, TypeError, "x must be"),
    ({"num_groups": 3}, ValueError, "num_groups must be .* divides x's 4 channels"),
    ({"num_groups": 0}, ValueError, "num_groups"),
    ({"num_groups": -2}, ValueError, "num_groups"),
    ({"num_groups": 2.0}, ValueError, "num_groups"),
    ({"num_groups": 8}, ValueError, "num_groups"),
    ({"weight": torch.ones(3)}, ValueError, "weight"),
    ({"weight": torch.ones(1, 4)}, ValueError, "weight"),
    ({"weight": torch.ones(4).double()}, TypeError, "weight"),
    ({"weight": torch.ones(4).bfloat16()}, TypeError, "weight"),
    ({"weight": torch.ones(4, device="meta")}, ValueError, "weight"),
    ({"weight": [1.0] * 4}, TypeError, "weight"),
    ({"bias": torch.ones(5)}, ValueError, "bias"),
    ({"bias": torch.ones(4, dtype=torch.int64)}, TypeError, "bias"),
    ({"scale": torch.ones(4)}, ValueError, "scale"),
    ({"scale": torch.ones(2, 3)}, ValueError, "scale"),
    ({"scale": torch.ones(2, 4, 3, 5)}, ValueError, "scale"),
    ({"scale": torch.ones(2, 4).half()}, TypeError, "scale"),
    ({"scale": 0.5}, TypeError, "scale"),
    ({"shift": torch.ones(3, 4)}, ValueError, "shift"),
    ({"offset": torch.ones(2, 3)}, ValueError, "offset"),
    ({"offset": torch.ones(2, 4).half()}, TypeError, "offset"),
    ({"offset": 0.5}, TypeError, "offset"),
    ({"skip": X[:, 0]}, ValueError, r"skip must have shape \(2, C2, 3, 5\) to go with x, got \(2, 3, 5\)"),
    ({"skip": X[:1]}, ValueError, "skip must have shape"),
    ({"skip": X[..., :1]}, ValueError, "skip must have shape"),
    ({"skip": X.half()}, TypeError, "skip must have x's dtype"),
    ({"skip": META}, ValueError, "skip must be on x's device"),
    ({"skip": SPARSE}, TypeError, "skip must be"),
    ({"skip": 1}, TypeError, "skip must be a tensor"),
    ({"skip": X, "num_groups": 3}, ValueError, "num_groups must be .* divides x's and skip's 8 channels"),
    ({"skip": X, "weight": torch.ones(4)}, ValueError, r"weight must have shape \(8,\)"),
    ({"skip": X, "offset": torch.ones(2, 4)}, ValueError, "offset must have shape"),
    ({"shift": torch.ones(2, 4, device="meta")}, ValueError, "shift"),
    ({"eps": -1e-5}, ValueError, "eps"),
    ({"eps": float("nan")}, ValueError, "eps"),
    ({"eps": "1e-5"}, TypeError, "eps"),
    ({"activation": "relu"}, ValueError, "activation"),
    ({"activation": True}, ValueError, "activation"),
]
CHANNEL_RMS_NORM = [
    mistake for mistake in GROUP_NORM if not {"num_groups", "bias", "offset", "skip"} & mistake[0].keys()
]
Q, K = randn(2, 5, 12), randn(2, 7, 12, seed=1)
HEADS: list[Mistake] = [
    ({"num_heads": 5}, ValueError, "num_heads must divide the 12 channels, got num_heads = 5"),
    ({"num_heads": 0}, ValueError, "num_heads must divide"),
    ({"num_heads": -2}, ValueError, "num_heads must divide"),
    ({"num_heads": 2.0}, TypeError, "num_heads must be an int, got float"),
    ({"num_heads": True}, TypeError, "num_heads must be an int, got bool"),
]
ATTENTION: list[Mistake] = [
    *HEADS,
    ({"q": Q.numpy()}, TypeError, "q must be a tensor"),
    ({"q": Q.long()}, TypeError, "q must be float32"),
    ({"q": Q[0]}, ValueError, r"q must have shape \(B, T, heads·d\) with channels_last=True, got \(5, 12\)"),
    ({"q": Q.unflatten(1, (1, 5))}, ValueError, "q must have shape"),
    ({"q": Q.transpose(1, 2), "channels_last": False}, ValueError, r"k must have shape \(2, 12, K\) to go with q"),
    ({"q": Q.double()}, TypeError, "k must have q's dtype torch.float64, got torch.float32"),
    ({"q": Q.to("meta")}, ValueError, "k must be on q's device meta"),
    ({"k": K[:1]}, ValueError, r"k must have shape \(2, K, 12\) to go with q of shape \(2, 5, 12\), got \(1, 7, 12\)"),
    ({"k": K[..., :8]}, ValueError, "k must have shape"),
    ({"k": K[0]}, ValueError, "k must have shape"),
    ({"k": None}, TypeError, "k must be a tensor"),
    ({"k": K[:, :0], "v": K[:, :0]}, ValueError, "k must have at least one position"),
    ({"v": K[:, :6]}, ValueError, r"v must have shape \(2, 7, 12\)"),
    ({"v": K.half()}, TypeError, "v must have q's dtype"),
    ({"v": K.to_sparse()}, TypeError, "v must be a dense"),
]
ATTENTION_QKV: list[Mistake] = [
    ({"num_heads": 5}, ValueError, "3·num_heads must divide the 36 channels, got num_heads = 5"),
    *HEADS[1:],
    ({"qkv": Q[:, 0]}, ValueError, r"qkv must have shape \(B, 3·heads·d, T\) with channels_last=False, got \(2, 12\)"),
    ({"qkv": Q, "channels_last": False}, ValueError, "3·num_heads must divide the 5 channels"),
    ({"qkv": Q[:, :0]}, ValueError, "3·num_heads must divide the 0 channels"),
    ({"qkv": 3}, TypeError, "qkv must be a tensor"),
    ({"order": "qkv"}, ValueError, "order must be one of hqkvc, qkvhc, hcqkv, got 'qkv'"),
    ({"order": None}, ValueError, "order must be one of"),
]
QKV, MEMORY = randn(2, 12, 5), randn(2, 2, 2, 3)
LINEAR_ATTENTION: list[Mistake] = [
    ({"qkv": X}, ValueError, r"qkv must have shape \(B, 3·heads·d, T\) with channels_last=False"),
    ({"qkv": QKV[0], "channels_last": True}, ValueError, r"qkv must have shape \(B, T, 3·heads·d\)"),
    ({"qkv": QKV.long()}, TypeError, "qkv must be float32"),
    ({"qkv": QKV.to_sparse()}, TypeError, "qkv must be a dense"),
    ({"qkv": QKV.numpy()}, TypeError, "qkv must be a tensor"),
    ({"channels_last": True}, ValueError, "3·num_heads must divide the 5 channels"),
    ({"num_heads": 3}, ValueError, "3·num_heads must divide the 12 channels, got num_heads = 3"),
    ({"num_heads": 0}, ValueError, "num_heads"),
    ({"num_heads": 2.0}, TypeError, "num_heads must be an int"),
    ({"num_heads": True}, TypeError, "num_heads must be an int"),
    ({"memory": MEMORY[0]}, ValueError, r"memory must have shape \(2, 2, 2, M\) with M at least 1"),
    ({"memory": MEMORY[..., :0]}, ValueError, "memory must have shape"),
    ({"memory": MEMORY.transpose(2, 3)}, ValueError, "memory must have shape"),
    ({"memory": MEMORY.double()}, TypeError, "memory must have qkv's dtype torch.float32"),
    ({"memory": MEMORY.half()}, TypeError, "memory must have qkv's dtype"),
    ({"memory": MEMORY, "qkv": QKV.double()}, TypeError, "memory must have qkv's dtype torch.float64"),
    ({"memory": MEMORY.to("meta")}, ValueError, "memory must be on qkv's device"),
    ({"memory": 4}, TypeError, "memory must be a tensor"),
]
TABLES = ProcessTables(SIGNAL, SIGMA)
DIFFUSION_LOSS: list[Mistake] = [
    ({"model_output": INTEGERS}, TypeError, "model_output must be"),
    ({"model_output": torch.tensor(1.0)}, ValueError, "model_output must have at least 1 dimension"),
    ({"model_output": X.numpy()}, TypeError, "model_output must be a tensor"),
    ({"model_output": SPARSE}, TypeError, "model_output must be"),
    ({"model_output": META}, ValueError, "must be on model_output's device"),
    ({"model_output": torch.cat([X, X], dim=1)}, ValueError, "x0 must have shape .* to go with model_output"),
    ({"x0": X[:1]}, ValueError, "x0 must have shape"),
    ({"x0": META}, ValueError, "x0 must be on"),
    ({"x0": INTEGERS}, TypeError, "x0 must be"),
    ({"x0": None}, TypeError, "x0 must be a tensor"),
    ({"t": torch.tensor([0.0, 1.0])}, TypeError, "t must be int64"),
    ({"t": torch.tensor(3)}, ValueError, "t must have shape"),
    ({"t": T.to("meta")}, ValueError, "t must be on"),
    ({"t": torch.tensor([0, 1000])}, ValueError, r"t must lie in \[0, 1000\), got 1000 at position 1"),
    ({"t": torch.tensor([-1, 0])}, ValueError, r"t must lie in \[0, 1000\), got -1 at position 0"),
    ({"t": torch.tensor([-1, 0]), "target": "x0"}, ValueError, "t must lie in"),
    ({"tables": (SIGNAL, SIGMA)}, TypeError, "tables must be those of a process"),
    ({"tables": None}, TypeError, "tables must be those of a process"),
    ({"tables": ProcessTables(SIGNAL, SIGMA[:-1])}, ValueError, "tables must be equally long, got 1000 and 999"),
    ({"tables": ProcessTables(SIGNAL.half(), SIGMA)}, TypeError, "tables.sqrt_alphas_cumprod must be"),
    ({"tables": ProcessTables(SIGNAL, SIGMA.numpy())}, TypeError, "tables.sqrt_one_minus_alphas_cumprod must be"),
    ({"tables": ProcessTables(SIGNAL, SIGMA.to("meta"))}, ValueError, "tables.sqrt_one_minus_alphas_cumprod must be"),
    ({"target": "xstart"}, ValueError, "target must be one of 'eps', 'x0', 'v', 'x_prev', 'flow', got 'xstart'"),
    ({"target": 0}, ValueError, "target must be"),
    ({"target": "x_prev"}, ValueError, "tables must have posterior_mean_coef1: the posterior is a GaussianProcess's"),
    (
        {"loss": "vlb"},
        ValueError,
        "loss must be one of 'mse', 'rescaled_mse', 'hybrid', 'kl', 'rescaled_kl', got 'vlb'",
    ),
    ({"loss": None}, ValueError, "loss must be"),
    ({"loss": "kl"}, ValueError, "tables must have posterior_log_variance_clipped: the posterior is a GaussianProc"),
    ({"loss": "kl", "variance": "small"}, ValueError, "variance must be one of 'fixed', 'fixed_small', .* got 'small'"),
    ({"loss": "kl", "variance": "fixed_small"}, ValueError, "tables must have posterior_mean_coef1"),
    ({"variance": "learned"}, ValueError, "x0 must have shape .* to go with model_output"),
    ({"weight": torch.ones(3)}, ValueError, "weight must have shape"),
    ({"weight": torch.ones(2, 1)}, ValueError, "weight must have shape"),
    ({"weight": torch.ones(2).half()}, TypeError, "weight must be float32 or float64"),
    ({"weight": torch.ones(2, dtype=torch.int64)}, TypeError, "weight must be"),
    ({"weight": 0.5}, TypeError, "weight must be a tensor"),
    ({"weight": torch.ones(2, device="meta")}, ValueError, "weight must be on"),
    *NOISE,
    *DRAW,
    *SOURCES,
    *(({**changed, "target": "v"}, error, message) for changed, error, message in SOURCES),
]
BOUND = GaussianProcess(linear_betas(1000)).tables()
VB_TERMS: list[Mistake] = [
    ({"model_output": INTEGERS}, TypeError, "model_output must be"),
    ({"model_output": META}, ValueError, "must be on model_output's device"),
    ({"x0": X[:, :1]}, ValueError, "x0 must have shape"),
    ({"t": torch.tensor([0.0, 1.0])}, TypeError, "t must be int64"),
    ({"t": torch.tensor([0, 1000])}, ValueError, r"t must lie in \[0, 1000\), got 1000 at position 1"),
    ({"tables": ProcessTables(SIGNAL, SIGMA)}, ValueError, "tables must have posterior_log_variance_clipped"),
    ({"tables": BOUND._replace(log_variance=None)}, ValueError, "variance must be given: the tables have no log_varia"),
    ({"tables": ProcessTables(SIGNAL, SIGMA), "variance": "learned"}, ValueError, "x0 must have shape"),
    ({"tables": BOUND._replace(log_betas=None)}, ValueError, "tables must have log_betas"),
    ({"tables": BOUND._replace(log_betas=SIGNAL[1:])}, ValueError, "tables must be equally long, got 999 and 1000"),
    ({"tables": BOUND._replace(log_variance=SIGNAL.half())}, TypeError, "tables.log_variance must be"),
    ({"target": "noise"}, ValueError, "target must be one of 'eps', 'x0', 'v', 'x_prev', 'flow', got 'noise'"),
    ({"variance": "learnt"}, ValueError, "variance must be one of .*, got 'learnt'"),
    ({"variance": "learned"}, ValueError, "x0 must have shape"),
    ({"model_output": X[:, :1], "variance": "learned"}, ValueError, r"model_output must be \(N, 2C, …\)"),
    ({"levels": 1}, ValueError, "levels must be an int of at least 2, got 1"),
    ({"levels": 256.0}, ValueError, "levels must be an int"),
    ({"decoder": "gauss"}, ValueError, "decoder must be one of 'tanh', 'exact', got 'gauss'"),
    ({"clip": (1.0, -1.0)}, ValueError, "clip must be"),
    ({"clip": (0.0,)}, ValueError, "clip must be"),
    ({"x_t": X}, ValueError, "exactly one of noise, x_t, seed and generator must be given, got 2"),
    ({"x_t": X[:1], "seed": None}, ValueError, "x_t must have shape"),
    ({"noise": X[:1], "seed": None}, ValueError, "noise must have shape"),
    ({"seed": None}, ValueError, "exactly one of noise, x_t, seed and generator must be given, got 0"),
]
SCALE: list[Mistake] = [
    ({"scale": "1"}, TypeError, "scale must be a number"),
    ({"scale": None}, TypeError, "scale must be a number"),
    ({"scale": torch.ones(2)}, ValueError, "scale must have shape"),
    ({"scale": torch.tensor(1)}, TypeError, "scale must be float32"),
    ({"scale": torch.ones((), device="meta")}, ValueError, "scale must be on"),
]

OPS = {
    "philox_uint32": (philox_uint32, {"shape": (2, 3), "seed": 1}, PHILOX),
    "philox_normal": (philox_normal, {"shape": (2, 3, 5), "seed": 1}, [*PHILOX, *NORMAL]),
    "q_sample": (
        q_sample,
        {"x0": X, "t": T, "sqrt_alphas_cumprod": SIGNAL, "sqrt_one_minus_alphas_cumprod": SIGMA, "seed": 1},
        Q_SAMPLE,
    ),
    "solver_step": (
        solver_step,
        {"x": X, "model_output": X, "program": programs.PLAIN, "row": 0, "seed": 1},
        SOLVER_STEP,
    ),
    "group_norm": (group_norm, {"x": X, "num_groups": 2}, GROUP_NORM),
    "channel_rms_norm": (channel_rms_norm, {"x": X}, CHANNEL_RMS_NORM),
    "attention": (attention, {"q": Q, "k": K, "v": K, "num_heads": 2}, ATTENTION),
    "attention_qkv": (attention_qkv, {"qkv": randn(2, 36, 5), "num_heads": 2}, ATTENTION_QKV),
    "linear_attention": (linear_attention, {"qkv": QKV, "num_heads": 2}, LINEAR_ATTENTION),
    "diffusion_loss": (
        diffusion_loss,
        {"model_output": X, "x0": X, "t": T, "tables": TABLES, "seed": 1},
        DIFFUSION_LOSS,
    ),
    "diffusion_loss_and_grad": (
        lambda **arguments: diffusion_loss_and_grad(**arguments)[1],
        {"model_output": X, "x0": X, "t": T, "tables": TABLES, "scale": 1.0, "seed": 1},
        [*DIFFUSION_LOSS, *SCALE],
    ),
    "vb_terms": (
        lambda **arguments: vb_terms(**arguments).vb,
        {"model_output": X, "x0": X, "t": T, "tables": BOUND, "seed": 1},
        VB_TERMS,
    ),
}
CASES = [(name, number) for name, (_, _, mistakes) in OPS.items() for number in range(len(mistakes))]


@pytest.mark.parametrize(("name", "number"), CASES, ids=lambda value: str(value))
def test_the_message_names_the_argument(backend, name, number):
    function, correct, mistakes = OPS[name]
    changed, error, message = mistakes[number]
    arguments = correct | changed
    dense = [a for a in arguments.values() if isinstance(a, torch.Tensor) and a.layout == torch.strided]
    with Untouched(*(a for a in dense if a.device.type == "cpu")), pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize("name", OPS)
def test_the_correct_call_is_correct(backend, name):
    """Otherwise the mistakes above would prove nothing."""
    function, correct, _ = OPS[name]
    assert bool(function(**correct).isfinite().all())


def test_nothing_is_written_when_a_row_is_out_of_range(backend):
    """The values are looked at before the first element is computed."""
    out, slots = torch.full((2, 4, 3, 5), 7.0), torch.full((3, 2, 4, 3, 5), 7.0)
    with pytest.raises(ValueError, match="row"):
        solver_step(X, X, programs.MULTISTEP, torch.tensor([0, 3]), slots=slots, seed=1, out=out)
    assert bool((out == 7.0).all())
    assert bool((slots == 7.0).all())


def test_an_index_out_of_range_gives_nan_where_nobody_can_look():
    """On devices whose values are not checked the sample is NaN: the gather itself must not fail."""
    from diffkern.ops._indices import gather

    found = gather(torch.arange(6.0).reshape(3, 2), torch.tensor([2, 3, -1, 0]))
    np.testing.assert_array_equal(found.numpy(), [[4, 5], [np.nan] * 2, [np.nan] * 2, [0, 1]])


def test_no_backend_is_chosen_for_a_bad_argument():
    """Metadata is checked before dispatch: the error is the same with a backend that does not exist here."""
    with use_backend("triton"), pytest.raises(ValueError, match="num_groups"):
        group_norm(X, 3)
