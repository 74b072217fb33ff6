"""Training a noise schedule with the network: the continuous-time bound of Kingma et al. 2021 (arXiv 2107.00630).

In nats per value, with γ = −log SNR as in ``log_snr``, x_u = √ᾱ·x0 + √(1−ᾱ)·ε and ε̂ what the network's output says ε
is, the bound on −log p(x0) is (their eqs. 11 and 17)

    ½·E_u[γ'(u)·‖ε − ε̂(x_u; γ(u))‖²]  +  KL(q(x_1 | x0) ‖ N(0, I))  −  E log p(x0 | x_0)

Substituting γ for u shows that the first term depends on γ_0, γ_1 and the network, and not on how γ runs between them.
So network and ends descend the bound, and the interior descends the variance of its estimate (their sections 5.1, 5.3,
I.2): as E[ℓ] is fixed, the gradient of the variance is that of E[ℓ²], 2·ℓ·∂ℓ, which needs no second pass.
docs/learned_schedule.md derives what is computed here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from diffkern.ops import diffusion_loss, philox_uint32, q_sample, vb_terms
from diffkern.process.gaussian import ProcessTables
from diffkern.training.log_snr import LearnedLogSNR

# Streams of the noise layout: what is drawn in one never overlaps what is drawn in another.
_EPS_STREAM, _TIMESTEP_STREAM = 3, 4
# One image in so many is also shown at γ_0, for the decoder's term: an eighth more work in the network.
_DECODED = 8
_PREDICTIONS = ("eps", "x0", "v", "flow")
_VARIANCES = ("fixed_small", "fixed_large")


@dataclass(frozen=True)
class LearnedSchedule:
    """A process whose noise schedule is trained with the network; given to ``Trainer`` in place of a GaussianProcess.

    The trained schedule is evaluated at ``num_timesteps`` levels of noise, which make the GaussianProcess that
    checkpoints carry. The network must take floating times (N,).

    Raises:
        ValueError: a field outside its range; names it.
    """

    num_timesteps: int = 1000
    """Of the process that the trained schedule becomes, and whose decoder is trained; 2 or more."""
    prediction: str = "eps"
    """What the network gives: "eps", "x0", "v" or "flow"."""
    variance: str = "fixed_small"
    """Of the reverse step, "fixed_small" or "fixed_large": the bound in continuous time has no place for another."""
    gamma_0: float | None = None
    """First −log SNR at the data's end; None: where σ is a sixth of a grey level, −13.3 for 256 levels of the data."""
    gamma_1: float = 5.0
    """First −log SNR at the noise's end."""
    lr_scale: float = 10.0
    """The schedule's learning rate over the network's: its few weights have further to go, in units of log SNR."""

    def __post_init__(self) -> None:
        allowed = {
            "num_timesteps": (self.num_timesteps >= 2, "2 or more"),
            "prediction": (self.prediction in _PREDICTIONS, "one of " + ", ".join(map(repr, _PREDICTIONS))),
            "variance": (self.variance in _VARIANCES, "one of " + ", ".join(map(repr, _VARIANCES))),
            "lr_scale": (self.lr_scale >= 0, "0 or more"),
        }
        for name, (holds, what) in allowed.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: of a learned schedule it must be {what}")

    def build(self, levels: int = 256) -> LearnedLogSNR:
        """The schedule before training, nearly a straight line in γ, for data of ``levels`` grey levels in [−1, 1].

        Raises ValueError if gamma_1 does not exceed gamma_0 by more than 1.
        """
        first = -2 * math.log(3 * (levels - 1)) if self.gamma_0 is None else self.gamma_0
        return LearnedLogSNR(first, self.gamma_1)


class BoundTerms(NamedTuple):
    """The bound's estimate in bits/dim, per image: `diffusion` and `prior` (N,) of all, `decoder` (M,) of some.

    `decoder_weight` (M,) makes Σ decoder·decoder_weight an unbiased estimate of the decoder's mean over the batch.
    """

    diffusion: Tensor
    prior: Tensor
    decoder: Tensor
    decoder_weight: Tensor

    def mean(self) -> Tensor:
        """The whole bound, averaged over the images: ()."""
        return (self.diffusion + self.prior).mean() + (self.decoder * self.decoder_weight).sum()


class ContinuousLoss:
    """The bound of one micro-batch, with gradients for the network, the schedule's ends and its interior.

    Times are stratified over the global batch of B images (their appendix I.1): image i has u = (u_0 + i/B) mod 1.
    u_0, ε and label dropout depend on the seed, the optimiser step and an image's position in the global batch
    alone: not on how the batch is split over micro-batches or processes.

    Args:
        schedule: trained where it requires gradients; on `device`.
        description: its num_timesteps and prediction are used.
        levels: grey levels of the data.
        batch_size: B.
        seed: in [0, 2^64).
        null_label: what a dropped label becomes; None if the network takes no labels.
        label_dropout: probability of dropping a label.
    """

    def __init__(
        self,
        schedule: LearnedLogSNR,
        description: LearnedSchedule,
        *,
        levels: int,
        batch_size: int,
        seed: int,
        null_label: int | None,
        label_dropout: float,
    ) -> None:
        self.schedule, self.description = schedule, description
        self.num_timesteps = description.num_timesteps
        self.levels, self.batch_size = levels, batch_size
        self.seed, self.null_label = seed, null_label
        self.dropped_below = round(label_dropout * 2**32)

    def __call__(self, model: nn.Module, x0: Tensor, labels: Tensor, step: int, samples: Tensor) -> Tensor:
        """The mean of the bound over the micro-batch in bits/dim, ().

        Its backward pass gives the network and the schedule's ends their gradient of it, and the interior the gradient
        of the mean of ℓ², the squares of the images' diffusion terms. Arguments as of ``terms``.
        """
        return self.terms(model, x0, labels, step, samples).mean()

    def terms(self, model: nn.Module, x0: Tensor, labels: Tensor, step: int, samples: Tensor) -> BoundTerms:
        """The bound's terms of every image.

        x0: float32 (N, C, H, W) in [−1, 1]. labels: int64 (N,), read only if the network takes labels.
        step: the optimiser step. samples: int64 (N,), the positions in the global batch, consecutive.
        Raises ValueError if the output's shape is not the images'.
        """
        n, target = len(x0), self.description.prediction
        draw = torch.tensor(step, device=x0.device)
        first, last = self.schedule.ends()
        rise = self.schedule.rise(self._times(draw, samples))
        gamma, slope = first * (1 - rise.height) + last * rise.height, (last - first) * rise.slope
        shown, weight = self._decoded(samples)
        images, positions = torch.cat([x0, x0[shown]]), torch.cat([samples, samples[shown]])
        gammas = torch.cat([gamma, first.expand(len(shown))])
        signal, sigma = _amplitudes(gammas)
        each = torch.arange(len(images), device=x0.device)
        eps: dict[str, Any] = {"seed": self.seed, "draw": draw, "stream": _EPS_STREAM}
        x_t = q_sample(images, each, signal, sigma, samples=positions, **eps)
        assert isinstance(x_t, Tensor)  # a pair only if the noise is asked for
        output = self._predict(model, x_t, self.schedule.time(gammas), labels, draw, samples, shown)

        tables = ProcessTables(signal[:n], sigma[:n])
        factor = 0.5 / math.log(2) * slope * _eps_per_output(gamma, target)
        diffusion = diffusion_loss(
            output[:n], x0, each[:n], tables, target=target, weight=factor, samples=samples, **eps
        )
        self._descend_variance(rise.height, rise.slope, diffusion.detach())
        decoder = vb_terms(
            output[n:],
            images[n:],
            torch.zeros_like(shown),
            self._first_tables(first, last),
            target=target,
            levels=self.levels,
            decoder="exact",
            samples=positions[n:],
            **eps,
        ).vb
        return BoundTerms(diffusion, _prior(last, x0), decoder, weight)

    def _times(self, draw: Tensor, samples: Tensor) -> Tensor:
        """u of each image, float64 (N,) in [0, 1)."""
        word = philox_uint32((1,), self.seed, draw=draw, samples=0, stream=_TIMESTEP_STREAM, device=samples.device)
        return ((word + 0.5) * 2.0**-32 + samples.double() / self.batch_size) % 1.0

    def _decoded(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (M,) into the micro-batch of every _DECODED-th image of the global batch, and their weights.

        M depends on N alone, so that nothing waits for the device: where there are fewer, an index is repeated with
        weight 0.
        """
        index = (-samples[0]) % _DECODED + torch.arange(0, len(samples), _DECODED, device=samples.device)
        there = index < len(samples)
        share = self.batch_size / math.ceil(self.batch_size / _DECODED) / len(samples)
        return index.clamp(max=len(samples) - 1), there * share

    def _predict(
        self,
        model: nn.Module,
        x_t: Tensor,
        times: Tensor,
        labels: Tensor,
        draw: Tensor,
        samples: Tensor,
        shown: Tensor,
    ) -> Tensor:
        """The network's output in float32 for the N images at their times and the M at γ_0."""
        arguments = [x_t, times.to(x_t.dtype)]
        if self.null_label is not None:
            words = philox_uint32(
                (len(samples), 2), self.seed, draw=draw, samples=samples, stream=_TIMESTEP_STREAM, device=x_t.device
            )
            kept = labels.masked_fill(words[:, 1] < self.dropped_below, self.null_label)
            arguments.append(torch.cat([kept, kept[shown]]))
        output = model(*arguments)
        if output.shape != x_t.shape:
            raise ValueError(f"the model's output is {tuple(output.shape)}, the images are {tuple(x_t.shape)}")
        return output.to(x_t.dtype)

    def _descend_variance(self, height: Tensor, slope: Tensor, losses: Tensor) -> None:
        """From here on what comes back through the interior is that of ℓ², not ℓ: each image's is multiplied by 2·ℓ."""
        for tensor in (height, slope):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: 2 * losses * gradient)

    def _first_tables(self, first: Tensor, last: Tensor) -> ProcessTables:
        """Timestep 0 of the process that the schedule becomes, whose decoder is N(x̂0, β̃_1), with gradient to the ends.

        β̃_1 = σ_0²·(1 − e^(γ_0 − γ(1/(T−1)))) is of the step from the second timestep to the first.
        """
        with torch.no_grad():
            step = self.schedule.rise(first.new_tensor(1 / (self.description.num_timesteps - 1))).height
        log_var = (logsigmoid(first) + torch.log(-torch.expm1((first - last) * step))).reshape(1)
        signal, sigma = _amplitudes(first.reshape(1))
        one = torch.ones_like(signal)
        return ProcessTables(signal, sigma, one, 0 * one, log_var, logsigmoid(first).reshape(1), log_var, "fixed")


def _amplitudes(gamma: Tensor) -> tuple[Tensor, Tensor]:
    """(√ᾱ, √(1−ᾱ)) at γ."""
    return torch.exp(logsigmoid(-gamma) / 2), torch.exp(logsigmoid(gamma) / 2)


def _eps_per_output(gamma: Tensor, target: str) -> Tensor:
    """‖ε − ε̂‖² over ‖m − m̂‖², m̂ being the target of the network's output m."""
    match target:
        case "x0":
            return torch.exp(-gamma)  # ε − ε̂ = −(s/σ)·(x0 − x̂0)
        case "v":
            return torch.sigmoid(-gamma)  # ε − ε̂ = s·(v − v̂)
        case "flow":
            return torch.sigmoid(-gamma / 2).square()  # ε − ε̂ = s/(s + σ)·(m − m̂)
    return torch.ones_like(gamma)


def _prior(gamma: Tensor, x0: Tensor) -> Tensor:
    """KL(N(√ᾱ·x0, (1−ᾱ)·I) ‖ N(0, I)) at γ, in bits/dim (N,)."""
    squares = x0.double().square().flatten(1).mean(1)
    return (torch.sigmoid(-gamma) * (squares - 1) - logsigmoid(gamma)) / (2 * math.log(2))
