"""StepProgram: a solver as a table of coefficients, one row a step.

With u, c the network's outputs, x the state, h_k the remembered tensors (slots), z unit noise and e an optional
tensor, a row says (docs of the op `solver_step`, which executes it in one kernel):

    m    = u + w·(c − u)                                          guidance; plain m without it
    x0   = clamp(a_x·x + a_m·m)                                   clamped if the program clips or thresholds
    x'   = c_x·x + c_m·m + c_0·x0 + Σ_k c_hk·h_k + c_z·σ·z + (c_e + c_v·σ²)·e
    h_j' = gj_x·x + gj_m·m + gj_0·x0 + Σ_k gj_hk·h_k              j = 0, 1: written to slots writes[row]
    x_in = s·x'                                                   what the network sees next

A coefficient of 0 means that its operand is not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

FIXED = ("a_x", "a_m", "c_x", "c_m", "c_0", "c_z", "c_e", "c_v", "s", "log_var_min", "log_var_max")
VARIANCES = ("fixed", "learned", "learned_range")


def columns(num_slots: int) -> tuple[str, ...]:
    """Names of the K = 17 + 3·num_slots columns of `StepProgram.coefficients`, in their order."""
    slots = range(num_slots)
    history = (f"c_h{k}" for k in slots)
    writes = (name for j in (0, 1) for name in (f"g{j}_x", f"g{j}_m", f"g{j}_0", *(f"g{j}_h{k}" for k in slots)))
    return (*FIXED, *history, *writes)


@dataclass(frozen=True, eq=False)
class StepProgram:
    """A solver's whole run; row 0 is executed first. Build one with :func:`step_program`.

    - `coefficients`: float64 (R, K), C-contiguous, read-only; K and its names are those of :func:`columns`.
    - `times`: float64 (R,), what the network is given at each row (whole numbers for a discrete process).
    - `calls_network`: bool (R,).
    - `writes`: int64 (R, 2), the slots that h_0' and h_1' go to, or −1.
    - `num_slots`: how many tensors are remembered.
    - `variance`: "fixed" (σ = 1, the network gives C channels), or how its further C channels v give σ per element:
      "learned" log σ² = v, "learned_range" log σ² = f·log_var_max + (1−f)·log_var_min with f = (v + 1)/2.
    - `clip`: (lo, hi) for x0, or None. `threshold`: (ratio, max) of dynamic thresholding, or None.
    - `scales_input`: whether the network sees s·x instead of x at any step. `makes_noise`: whether any row adds noise,
      so that its steps must be given a source of it. `written`: the slots that each row writes. They follow from the
      others.

    Raises ValueError naming the field that is not so.
    """

    coefficients: np.ndarray
    times: np.ndarray
    calls_network: np.ndarray
    writes: np.ndarray
    num_slots: int
    variance: str
    clip: tuple[float, float] | None
    threshold: tuple[float, float] | None
    scales_input: bool = field(init=False)
    makes_noise: bool = field(init=False)
    written: tuple[tuple[int, ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rows = len(self.coefficients)
        expected: dict[str, tuple[type, tuple[int, ...]]] = {
            "coefficients": (np.float64, (rows, len(columns(self.num_slots)))),
            "times": (np.float64, (rows,)),
            "calls_network": (np.bool_, (rows,)),
            "writes": (np.int64, (rows, 2)),
        }
        for name, (dtype, shape) in expected.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous or array.flags.writeable:
                raise ValueError(
                    f"{name} is {array.dtype} of shape {array.shape}; "
                    f"it must be {np.dtype(dtype)} of shape {shape}, C-contiguous and read-only"
                )
        if rows == 0:
            raise ValueError("coefficients have no rows; a program has at least one")
        self._check_values()
        # Asked for at every step, also inside torch.compile: so they are plain attributes.
        object.__setattr__(self, "scales_input", bool((self.column("s") != 1).any()))
        object.__setattr__(self, "makes_noise", bool((self.column("c_z") != 0).any()))
        object.__setattr__(self, "written", tuple(tuple(k for k in row if k >= 0) for row in self.writes.tolist()))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copies and unpickled programs come with writeable arrays.
        self.__dict__.update(state)
        for value in state.values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)

    def _check_values(self) -> None:
        # Kernels hold coefficients in float32: what is finite here and infinite there would make 0·inf of it.
        bad = np.argwhere(~(np.abs(self.coefficients) <= np.finfo(np.float32).max))
        if bad.size:
            row, column = bad[0]
            raise ValueError(
                f"coefficients[{row}], column {columns(self.num_slots)[column]}, is {self.coefficients[row, column]}; "
                "it must be finite in float32"
            )
        if not np.isfinite(self.times).all():
            raise ValueError(f"times must be finite; they are {self.times}")
        if (self.writes < -1).any() or (self.writes >= self.num_slots).any():
            raise ValueError(f"writes must be slots below {self.num_slots}, or -1; they are {self.writes.tolist()}")
        if ((self.writes[:, 0] == self.writes[:, 1]) & (self.writes[:, 0] >= 0)).any():
            raise ValueError("writes: a row writes one slot twice")
        if self.variance not in VARIANCES:
            raise ValueError(f"variance is {self.variance!r}; it may be one of {', '.join(map(repr, VARIANCES))}")
        if self.clip is not None and not (_is_pair(self.clip) and self.clip[0] < self.clip[1]):
            raise ValueError(f"clip is {self.clip}; it must be (lo, hi) with lo < hi, or None")
        if self.threshold is not None and not (
            _is_pair(self.threshold) and 0 < self.threshold[0] <= 1 and self.threshold[1] > 0
        ):
            raise ValueError(f"threshold is {self.threshold}; it must be (ratio in (0, 1], max > 0), or None")

    @property
    def num_rows(self) -> int:
        """R, the number of steps."""
        return len(self.coefficients)

    def column(self, name: str) -> np.ndarray:
        """The column called `name`, a read-only float64 view (R,)."""
        return self.coefficients[:, columns(self.num_slots).index(name)]

    def x0_program(self) -> StepProgram:
        """The program whose step returns this one's x0 (clipped alike) instead of its next x."""
        return step_program(
            {"a_x": self.column("a_x"), "a_m": self.column("a_m"), "c_0": np.ones(self.num_rows)},
            self.times,
            calls_network=self.calls_network,
            variance=self.variance,
            clip=self.clip,
            threshold=self.threshold,
        )

    def with_x0(self) -> StepProgram:
        """The same program with one more slot, the last, to which every row writes its x0.

        Raises ValueError where a row writes two slots already.
        """
        if (self.writes >= 0).all(axis=1).any():
            raise ValueError("writes: a row writes two slots already; it has none left for x0")
        free = (self.writes[:, 0] >= 0).astype(int)  # which of the two is
        rows = np.arange(self.num_rows)
        writes = self.writes.copy()
        writes[rows, free] = self.num_slots
        named = {name: self.column(name).copy() for name in columns(self.num_slots)}
        for name, column in named.items():
            for j in (0, 1):
                if name.startswith(f"g{j}_"):
                    column[free == j] = name == f"g{j}_0"
        return step_program(
            named,
            self.times,
            calls_network=self.calls_network,
            writes=writes,
            num_slots=self.num_slots + 1,
            variance=self.variance,
            clip=self.clip,
            threshold=self.threshold,
        )


def _is_pair(value: object) -> bool:
    return isinstance(value, Sized) and len(value) == 2 and not isinstance(value, str)


def step_program(
    named: Mapping[str, ArrayLike],
    times: ArrayLike,
    *,
    calls_network: ArrayLike | None = None,
    writes: ArrayLike | None = None,
    num_slots: int = 0,
    variance: str = "fixed",
    clip: tuple[float, float] | None = None,
    threshold: tuple[float, float] | None = None,
) -> StepProgram:
    """Assemble a StepProgram from columns (R,) by name; one that is missing is 0 (s: 1).

    `calls_network` defaults to every row, `writes` to none. A program that neither clips nor thresholds has x0 folded
    into the coefficients of x and m, here in float64: x0 is then a large multiple of x minus nearly the same of m
    where ᾱ is small, which float32 should not have to subtract. a_x and a_m stay, so that x0 can still be shown.

    Raises ValueError for a column that does not exist or has another length, and as StepProgram does.
    """
    time_rows = np.array(times, dtype=np.float64)
    rows = time_rows.size
    names = columns(num_slots)
    coefficients = np.zeros((rows, len(names)))
    coefficients[:, names.index("s")] = 1
    for name, column in named.items():
        if name not in names:
            raise ValueError(f"column {name!r} does not exist with {num_slots} slots; there are {', '.join(names)}")
        values = np.asarray(column, dtype=np.float64)
        if values.shape != (rows,):
            raise ValueError(f"column {name!r} has shape {values.shape}; it must be ({rows},), as times")
        coefficients[:, names.index(name)] = values
    if clip is None and threshold is None:
        a_x, a_m = coefficients[:, names.index("a_x")], coefficients[:, names.index("a_m")]
        for family in ("c", "g0", "g1"):
            of_x0 = names.index(f"{family}_0")
            coefficients[:, names.index(f"{family}_x")] += coefficients[:, of_x0] * a_x
            coefficients[:, names.index(f"{family}_m")] += coefficients[:, of_x0] * a_m
            coefficients[:, of_x0] = 0
    arrays = (
        coefficients,
        time_rows,
        np.array(np.ones(rows) if calls_network is None else calls_network, dtype=np.bool_),
        np.array(np.full((rows, 2), -1) if writes is None else writes, dtype=np.int64),
    )
    for array in arrays:
        array.setflags(write=False)
    return StepProgram(*arrays, num_slots=num_slots, variance=variance, clip=clip, threshold=threshold)
