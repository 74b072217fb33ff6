"""What every solver says first: x0 from the network's output."""

from __future__ import annotations

import numpy as np

from diffkern.process import GaussianProcess


def x0_columns(process: GaussianProcess) -> dict[str, np.ndarray]:
    """Columns a_x and a_m, x0 = a_x·x + a_m·m, for the steps of `process` from the last to the first.

    Raises ValueError where ᾱ_t is 0, or so near it that 1/√ᾱ_t leaves float32, and the network predicts eps.
    """
    a_x, a_m = process.conversion(process.prediction, "x0")
    beyond = np.flatnonzero(~(a_x <= np.finfo(np.float32).max))
    if beyond.size:
        t = beyond[0]
        raise ValueError(
            f"prediction is {process.prediction!r}, but alphas_cumprod[{t}] is {process.alphas_cumprod[t]}: x0 cannot "
            "be recovered from it; use prediction 'x0' or 'v', or a schedule that ends above 0"
        )
    return {"a_x": a_x[::-1], "a_m": a_m[::-1]}
