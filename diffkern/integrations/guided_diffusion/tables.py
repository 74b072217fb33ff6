"""The float64 tables of a diffusion, what is derived from them, and their values at each sample's own timestep."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from diffkern.integrations.draws import check_noise
from diffkern.integrations.guided_diffusion.types import LossType, ModelMeanType, ModelVarType
from diffkern.ops._checks import check_index
from diffkern.ops._indices import check_values, gather
from diffkern.ops._registry import in_plain_eager_mode
from diffkern.process import GaussianProcess

_OF_THE_PROCESS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
TABLES = frozenset(
    (*_OF_THE_PROCESS, "alphas_cumprod_next", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
)


class Tables:
    """The constructor and the tables of :class:`GaussianDiffusion`, where both are described."""

    betas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    alphas_cumprod_next: np.ndarray
    sqrt_alphas_cumprod: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray
    log_one_minus_alphas_cumprod: np.ndarray
    sqrt_recip_alphas_cumprod: np.ndarray
    sqrt_recipm1_alphas_cumprod: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance_clipped: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray

    # What was made from the attributes: programs and tensors. Assigning to any attribute empties it.
    _made: dict[Any, Any]

    def __init__(
        self,
        *,
        betas: ArrayLike,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
        noise: str = "torch",
    ) -> None:
        process = GaussianProcess(betas)
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.noise = check_noise(noise)
        self.num_timesteps = process.num_timesteps
        for name in _OF_THE_PROCESS:
            setattr(self, name, getattr(process, name))
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        with np.errstate(divide="ignore"):  # a last β of 1 leaves ᾱ = 0
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1.0)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, _locked(name, value) if name in TABLES else value)
        object.__setattr__(self, "_made", {})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_made"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Through __setattr__: a copy's arrays come writeable.
        for name, value in state.items():
            setattr(self, name, value)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first asked for under `key`, until an attribute changes."""
        if key not in self._made:
            # What is made here is no business of torch.compile, which cannot trace it.
            compiler = sys.modules.get("torch._dynamo")
            made = functools.partial(_outside_inference_mode, make)
            self._made[key] = made() if compiler is None else compiler.disable(made)()
        return self._made[key]

    def _checked(self, t: Tensor, x: Tensor) -> Tensor:
        """t as int64 (N,) for the samples of x; ValueError or TypeError naming it where it cannot be that.

        A single timestep (1,) is all of theirs.
        """
        return _checked_index(t, x, [(len(x),), (1,)], len(self.betas)).expand(len(x))

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """The table called `name` at t (N,) or (1,), to broadcast over `like` (N, …).

        float32, as the peer has it whatever like's dtype is, or float64 for a float64 `like`.
        """
        return gathered(self._tensor(name, like.device), t, like)

    def _tensor(self, name: str, device: torch.device) -> Tensor:
        """The table called `name` as a float64 tensor (T,) on `device`."""
        return self._once((name, device), lambda: torch.tensor(_table(self, name), device=device))


def _outside_inference_mode(make: Callable[[], Any]) -> Any:
    """What `make` returns: tensors that autograd may save in a later call."""
    with torch.inference_mode(False):
        return make()


def _extract_into_tensor(arr: np.ndarray, timesteps: Tensor, broadcast_shape: Sequence[int]) -> Tensor:
    """arr[t] as float32 of the whole `broadcast_shape` (N, …) (an expanded view), for t (N,) or (1,).

    Here for code that was written against the peer's function of this name. Raises ValueError for a t out of range on
    a CPU and gives NaN elsewhere.
    """
    like = torch.empty((), device=timesteps.device).expand(*broadcast_shape)
    return gathered(torch.tensor(arr, device=timesteps.device), timesteps, like).expand(*broadcast_shape)


def gathered(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """table[t] for t (N,) or (1,) to broadcast over `like` (N, …): float32, or float64 for a float64 `like`."""
    t = _checked_index(t, like, [(len(like),), (1,)], len(table))
    values = gather(table, t).to(torch.float64 if like.dtype == torch.float64 else torch.float32)
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _checked_index(t: Tensor, x: Tensor, shapes: Sequence[tuple[int, ...]], size: int) -> Tensor:
    if isinstance(t, Tensor) and t.dtype == torch.int32:
        t = t.long()
    check_index("t", t, "x", x, shapes)
    if in_plain_eager_mode():  # a trace cannot look
        check_values("t", t, size)
    return t


def _locked(name: str, value: ArrayLike) -> np.ndarray:
    """A float64 copy of a table that nobody can write into, which nothing here would notice."""
    table = np.array(value, dtype=np.float64)
    if table.ndim != 1:
        raise ValueError(f"{name} has shape {table.shape}; it must be (T,), one value for each timestep")
    table.setflags(write=False)
    return table


def _table(diffusion: Tables, name: str) -> np.ndarray:
    """The attribute called `name`, or what is derived from them under that name."""
    match name:
        case "one_minus_alphas_cumprod":
            return 1.0 - diffusion.alphas_cumprod
        case "model_variance":
            return model_variance(diffusion)[0]
        case "model_log_variance":
            return model_variance(diffusion)[1]
        case "log_betas":
            return np.log(diffusion.betas)
        case "xstart_of_xprev":
            return 1.0 / diffusion.posterior_mean_coef1
        case "xstart_of_x_t":
            return -diffusion.posterior_mean_coef2 / diffusion.posterior_mean_coef1
        case "score_to_xstart":
            return score_to_xstart(diffusion)
    return getattr(diffusion, name)


def model_variance(diffusion: Tables) -> tuple[np.ndarray, np.ndarray]:
    """(σ², its logarithm), float64 (T,), of a fixed reverse variance; the logarithm of β̃_0 = 0 is β̃_1's."""
    if diffusion.model_var_type == ModelVarType.FIXED_SMALL:
        return diffusion.posterior_variance, diffusion.posterior_log_variance_clipped
    # A process of one step has no β̃_1; β_0 stands in for it, as in the clipped logarithm.
    first = diffusion.posterior_variance[1:2] if len(diffusion.betas) > 1 else diffusion.betas[:1]
    variance = np.append(first, diffusion.betas[1:])
    return variance, np.log(variance)


def score_to_xstart(diffusion: Tables) -> np.ndarray:
    """√(1/ᾱ−1)·√(1−ᾱ), float64 (T,): how far a unit of a classifier's gradient moves x0 (Dhariwal & Nichol 2021)."""
    return diffusion.sqrt_recipm1_alphas_cumprod * np.sqrt(1.0 - diffusion.alphas_cumprod)
