"""What every solver says first: x0 from the network's output."""

from __future__ import annotations

import numpy as np

from diffkern.process import GaussianProcess

LEVEL_PREDICTIONS = ("eps", "x0", "v", "flow")


def prediction_columns(alpha: np.ndarray, sigma: np.ndarray, prediction: str) -> tuple[np.ndarray, ...]:
    """(a_x, a_m, e_x, e_m) with x0 = a_x·x + a_m·m and ε = e_x·x + e_m·m for x = alpha·x0 + sigma·ε; of alpha's shape.

    m is ε ("eps"), x0 itself ("x0"), v = (α·ε − σ·x0)/k with k² = α² + σ² ("v": Salimans & Ho 2022, arXiv 2202.00512,
    appendix D, for a state that is k times theirs), or ε − x0 ("flow": Lipman et al. 2023, arXiv 2210.02747). Of "x0",
    e_x and e_m are infinite where sigma is 0.

    Raises ValueError for another prediction, and where alpha is 0, or so near it that 1/alpha leaves float32, and the
    network predicts eps.
    """
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    match prediction:
        case "eps":
            _check_recoverable(alpha, "alpha")
            return 1 / alpha, -sigma / alpha, zero, one
        case "x0":
            with np.errstate(divide="ignore"):
                return zero, one, 1 / sigma, -alpha / sigma
        case "v":
            scale2 = alpha**2 + sigma**2
            return alpha / scale2, -sigma / np.sqrt(scale2), sigma / scale2, alpha / np.sqrt(scale2)
        case "flow":
            total = alpha + sigma
            return 1 / total, -sigma / total, 1 / total, alpha / total
    raise ValueError(f"prediction is {prediction!r}; it may be one of {', '.join(map(repr, LEVEL_PREDICTIONS))}")


def x0_columns(process: GaussianProcess) -> dict[str, np.ndarray]:
    """Columns a_x and a_m, x0 = a_x·x + a_m·m, for the steps of `process` from the last to the first.

    Raises ValueError where x0 cannot be had from the prediction: eps at ᾱ = 0.
    """
    a_x, a_m = process.conversion(process.prediction, "x0")
    beyond = np.flatnonzero(~(np.abs(a_x) <= np.finfo(np.float32).max))
    if beyond.size:
        t = beyond[0]
        raise ValueError(
            f"prediction is {process.prediction!r}, but alphas_cumprod[{t}] is {process.alphas_cumprod[t]}: x0 cannot "
            "be recovered from it; use prediction 'x0' or 'v', or a schedule that ends above 0"
        )
    return {"a_x": a_x[::-1], "a_m": a_m[::-1]}


def _check_recoverable(alpha: np.ndarray, name: str) -> None:
    beyond = np.flatnonzero(~(alpha >= 1 / np.finfo(np.float32).max))
    if beyond.size:
        raise ValueError(
            f"prediction is 'eps', but {name}[{beyond[0]}] is {alpha[beyond[0]]}: x0 cannot be recovered from it; "
            "use prediction 'x0' or 'v', or a schedule that ends above 0"
        )
