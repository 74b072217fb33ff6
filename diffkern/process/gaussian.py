"""The Gaussian diffusion process as float64 tables: marginal, posterior, parameterisations, respacing."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from diffkern.process.schedules import check_betas
from diffkern.process.spacing import Steps, check_rising, pick_timesteps, respaced_betas

if TYPE_CHECKING:
    import torch

PREDICTIONS = ("eps", "x0", "v", "x_prev", "flow")
VARIANCES = ("fixed_small", "fixed_large", "analytic", "learned", "learned_range")


class ProcessTables(NamedTuple):
    """The tables that the ops read, float64 tensors (T,): x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε.

    The further ones are of the posterior and of the reverse step, None for a process that has none: its coefficients
    (mean coef1·x0 + coef2·x_t), log β̃_t, log β_t, and `log_variance`, the logarithm of a fixed reverse variance (None
    for a learned one). `variance` is "fixed", "learned" or "learned_range".
    """

    sqrt_alphas_cumprod: torch.Tensor
    sqrt_one_minus_alphas_cumprod: torch.Tensor
    posterior_mean_coef1: torch.Tensor | None = None
    posterior_mean_coef2: torch.Tensor | None = None
    posterior_log_variance_clipped: torch.Tensor | None = None
    log_betas: torch.Tensor | None = None
    log_variance: torch.Tensor | None = None
    variance: str = "fixed"


class GaussianProcess:
    """q(x_t | x_{t−1}) = N(√(1−β_t)·x_{t−1}, β_t·I), and what the network says about its reverse.

    `betas` (T,) in (0, 1]. t is 0-based everywhere: t = 0 has one step of noise. `prediction` is what the network's
    output means: "eps", "x0", "v" = √ᾱ·ε − √(1−ᾱ)·x0, "x_prev" (the mean of x_{t−1}), or "flow" = ε − x0. `variance` is
    the reverse step's: "fixed_small" (β̃_t), "fixed_large" (β_t, but β̃_1 at t = 0), "analytic" (the best one for the
    network at hand, see below), "learned" (the network's further C channels are its logarithm), or "learned_range"
    (they interpolate between log β̃_t and log β_t; Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15). `timestep_map`
    (T,) is what the network is given at each t: by default t itself, after respacing the timestep of the original
    process; int64, or float64 if it is given as floating-point numbers.

    `eps_mean_square` (T,) belongs to "analytic" alone: E‖ε̂(x_t, t)‖²/d, the mean square of the network's prediction of
    the noise over images and noise (`diffkern.evaluation.estimate_eps_mean_square`). The variance is then

        σ²_t = β̃_t + coef1_t²·(1/ᾱ_t − 1)·(1 − eps_mean_square_t),  the last factor held in [0, 1]

    (Bao et al. 2022, arXiv 2201.06503, theorem 1 with λ² = β̃ and the bounds of theorem 2; not below β̃_1 at t = 0): the
    mean of Var(x_{t−1} | x_t) where ε̂ is the best prediction. Respacing keeps the estimate: it belongs to ᾱ_t.

    The attributes are read-only float64 arrays (T,), named as in OpenAI's code: `betas`, `alphas_cumprod` (ᾱ_t),
    `alphas_cumprod_prev` (ᾱ_{t−1}, 1 at t = 0), `sqrt_alphas_cumprod`, `sqrt_one_minus_alphas_cumprod`,
    `log_one_minus_alphas_cumprod`, and of the posterior (Ho et al. 2020, arXiv 2006.11239, eq. 7)
    q(x_{t−1} | x_t, x0) = N(coef1·x0 + coef2·x_t, β̃_t·I): `posterior_mean_coef1`, `posterior_mean_coef2`,
    `posterior_variance`, `posterior_log_variance_clipped` (β̃_0 = 0 replaced by β̃_1 before the logarithm).
    `model_variance` and `model_log_variance` are those of a fixed reverse variance, None for a learned one;
    `channel_variance` is "fixed", "learned" or "learned_range": what the network's further channels say.

    Raises ValueError for betas, a prediction, a variance, a map or mean squares that are none of these; for "analytic"
    without `eps_mean_square` or with a β of 1, where ε says nothing of x0, and for `eps_mean_square` without it.
    """

    def __init__(
        self,
        betas: ArrayLike,
        prediction: str = "eps",
        variance: str = "fixed_small",
        timestep_map: ArrayLike | None = None,
        eps_mean_square: ArrayLike | None = None,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {prediction!r}; it may be one of {', '.join(map(repr, PREDICTIONS))}")
        if variance not in VARIANCES:
            raise ValueError(f"variance is {variance!r}; it may be one of {', '.join(map(repr, VARIANCES))}")
        self.prediction = prediction
        self.variance = variance
        self.channel_variance = variance if variance.startswith("learned") else "fixed"
        self.betas = check_betas(betas)
        self.num_timesteps = len(self.betas)
        self.timestep_map = _times(np.arange(self.num_timesteps) if timestep_map is None else timestep_map, self.betas)
        self.eps_mean_square = _mean_squares(eps_mean_square, variance, self.betas)

        self.alphas_cumprod = np.cumprod(1.0 - self.betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)

        noise = 1.0 - self.alphas_cumprod
        noise_prev = 1.0 - self.alphas_cumprod_prev
        self.posterior_mean_coef1 = np.sqrt(self.alphas_cumprod_prev) * self.betas / noise
        self.posterior_mean_coef2 = np.sqrt(1.0 - self.betas) * noise_prev / noise
        self.posterior_variance = noise_prev / noise * self.betas
        # β̃_0 = 0 has no logarithm; a process of one step has no β̃_1 either, and takes β_0.
        second = self.posterior_variance[1] if self.num_timesteps > 1 else self.betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(second, self.posterior_variance[1:]))

        self.model_variance: np.ndarray | None = None
        self.model_log_variance: np.ndarray | None = None
        if variance == "fixed_small":
            self.model_variance = self.posterior_variance
            self.model_log_variance = self.posterior_log_variance_clipped
        elif variance == "fixed_large":
            self.model_variance = np.append(second, self.betas[1:])
            self.model_log_variance = np.log(self.model_variance)
        elif self.eps_mean_square is not None:
            # coef1²·(1/ᾱ − 1), in a form that an underflowed ᾱ does not harm.
            largest = self.betas**2 / ((1.0 - self.betas) * noise)
            variances = self.posterior_variance + largest * np.clip(1.0 - self.eps_mean_square, 0.0, 1.0)
            self.model_variance = np.maximum(variances, np.append(second, self.posterior_variance[1:]))
            self.model_log_variance = np.log(self.model_variance)
        for table in vars(self).values():
            if isinstance(table, np.ndarray):
                table.setflags(write=False)

    def q_mean_variance(self, x0: np.ndarray, t: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean, variance and log-variance of q(x_t | x0) for x0 (N, …) and t (N,); the last two broadcast to x0."""
        return (
            self._at(self.sqrt_alphas_cumprod, t, x0) * x0,
            self._at(1.0 - self.alphas_cumprod, t, x0),
            self._at(self.log_one_minus_alphas_cumprod, t, x0),
        )

    def q_posterior_mean_variance(
        self, x0: np.ndarray, x_t: np.ndarray, t: ArrayLike
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean, variance and clipped log-variance of q(x_{t−1} | x_t, x0); t (N,), the last two broadcast to x0."""
        coef1, coef2 = self._at(self.posterior_mean_coef1, t, x0), self._at(self.posterior_mean_coef2, t, x0)
        return (
            coef1 * x0 + coef2 * x_t,
            self._at(self.posterior_variance, t, x0),
            self._at(self.posterior_log_variance_clipped, t, x0),
        )

    def conversion(self, source: str, target: str) -> tuple[np.ndarray, np.ndarray]:
        """Tables p, q (T,) with target = p·x_t + q·source, for source and target among PREDICTIONS.

        They follow from x_t = s·x0 + σ·ε with s = √ᾱ, σ = √(1−ᾱ), from v = s·ε − σ·x0 (Salimans & Ho 2022,
        arXiv 2202.00512, appendix D), flow = ε − x0, and x_prev = coef1·x0 + coef2·x_t. Where ᾱ_t = 0 (a last β of 1),
        x_t says nothing of x0, and the conversions from eps are infinite; at t = 0, x_prev is x0.
        """
        for name, value in (("source", source), ("target", target)):
            if value not in PREDICTIONS:
                raise ValueError(f"{name} is {value!r}; it may be one of {', '.join(map(repr, PREDICTIONS))}")
        if source == target:
            return np.zeros(self.num_timesteps), np.ones(self.num_timesteps)
        # Each is p·x_t + q·x0 …
        p, q = self._of_x0(target)
        of_x, of_source = self._of_x0(source)
        if source == "x0":
            return p, q
        if {source, target} == {"eps", "v"}:
            # … but x0 need not be had in between: these two know each other where it cannot.
            s, sigma = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
            if source == "v":
                return sigma, s
            with np.errstate(divide="ignore"):
                return -sigma / s, 1 / s
        with np.errstate(divide="ignore", invalid="ignore"):
            x0_of_x, x0_of_source = -of_x / of_source, 1 / of_source
            return p + q * x0_of_x, q * x0_of_source

    def _of_x0(self, target: str) -> tuple[np.ndarray, np.ndarray]:
        """Tables p, q (T,) with target = p·x_t + q·x0."""
        s, sigma = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        match target:
            case "eps":
                return 1 / sigma, -s / sigma
            case "v":
                return s / sigma, -1 / sigma
            case "x_prev":
                return self.posterior_mean_coef2, self.posterior_mean_coef1
            case "flow":
                return 1 / sigma, -(s + sigma) / sigma
        return np.zeros_like(s), np.ones_like(s)

    def convert(self, x_t: np.ndarray, value: np.ndarray, t: ArrayLike, source: str, target: str) -> np.ndarray:
        """`value` (N, …), which is `source` at x_t (N, …) and t (N,), as `target`; see :meth:`conversion`."""
        p, q = self.conversion(source, target)
        return self._at(p, t, x_t) * x_t + self._at(q, t, x_t) * value

    def spaced(self, steps: Steps | None, spacing: str = "respaced", steps_offset: int = 0) -> list[int]:
        """The timesteps in [0, T) that `steps` picks, rising: all for None, else those of `space_timesteps`."""
        return pick_timesteps(self.num_timesteps, steps, spacing, steps_offset)

    def respace(self, steps: Steps | None) -> GaussianProcess:
        """The process of fewer steps: an int S (evenly spaced), section counts, "ddimN", or None for all of them."""
        return self.keep(self.spaced(steps))

    def keep(self, timesteps: ArrayLike) -> GaussianProcess:
        """The process of the given steps alone, rising in [0, T); ᾱ stays what it was at each of them.

        Its `timestep_map` says which of the original process's timesteps they are.
        """
        kept = check_rising(timesteps, self.num_timesteps)
        if kept.size == self.num_timesteps:
            return self
        mean_squares = None if self.eps_mean_square is None else self.eps_mean_square[kept]
        return GaussianProcess(
            respaced_betas(self.betas, kept), self.prediction, self.variance, self.timestep_map[kept], mean_squares
        )

    def tables(self, device: torch.device | str | None = None) -> ProcessTables:
        """The tables that the ops read, as float64 tensors (T,) on `device`."""
        import torch

        def tensor(table: np.ndarray) -> torch.Tensor:
            return torch.tensor(table, device=device)

        return ProcessTables(
            tensor(self.sqrt_alphas_cumprod),
            tensor(self.sqrt_one_minus_alphas_cumprod),
            tensor(self.posterior_mean_coef1),
            tensor(self.posterior_mean_coef2),
            tensor(self.posterior_log_variance_clipped),
            tensor(np.log(self.betas)),
            None if self.model_log_variance is None else tensor(self.model_log_variance),
            self.channel_variance,
        )

    def _at(self, table: np.ndarray, t: ArrayLike, like: np.ndarray) -> np.ndarray:
        """table[t] (N,) with trailing axes of length 1, to meet `like` (N, …); ValueError for a t out of range."""
        index = np.asarray(t)
        if index.dtype.kind not in "iu" or index.shape != like.shape[:1]:
            raise ValueError(
                f"t is {index.dtype} of shape {index.shape}; it must be integers of shape {like.shape[:1]}"
            )
        if ((index < 0) | (index >= self.num_timesteps)).any():
            raise ValueError(f"t must be in [0, {self.num_timesteps}); it runs from {index.min()} to {index.max()}")
        return table[index].reshape(-1, *[1] * (like.ndim - 1))


def _times(timestep_map: ArrayLike, betas: np.ndarray) -> np.ndarray:
    """A copy of `timestep_map` (T,), int64 or float64; ValueError unless it holds as many finite numbers as `betas`."""
    times = np.array(timestep_map)
    if times.shape != betas.shape or times.dtype.kind not in "iuf" or not np.isfinite(times).all():
        raise ValueError(
            f"timestep_map is {times.dtype} of shape {times.shape}; it must hold {len(betas)} finite numbers"
        )
    return times.astype(np.float64 if times.dtype.kind == "f" else np.int64)


def _mean_squares(eps_mean_square: ArrayLike | None, variance: str, betas: np.ndarray) -> np.ndarray | None:
    """A copy of `eps_mean_square` (T,), float64; None, and needed to be so, for another variance than "analytic"."""
    if (eps_mean_square is None) != (variance != "analytic"):
        raise ValueError(
            f"eps_mean_square is {'not ' if eps_mean_square is None else ''}given and variance is {variance!r}; "
            "'analytic' needs it, and no other takes it"
        )
    if eps_mean_square is None:
        return None
    mean_squares = np.array(eps_mean_square, dtype=np.float64)
    if mean_squares.shape != betas.shape or not (np.isfinite(mean_squares) & (mean_squares >= 0)).all():
        raise ValueError(
            f"eps_mean_square has the shape {mean_squares.shape}; it must hold {len(betas)} finite numbers, 0 or more"
        )
    if betas.max() == 1:
        raise ValueError("variance is 'analytic' and betas reach 1, where eps says nothing of x0")
    return mean_squares
