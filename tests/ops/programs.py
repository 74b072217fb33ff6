"""StepPrograms with arbitrary coefficients: the op must execute any table, not only the ones solvers write."""

from __future__ import annotations

import numpy as np

from diffkern.solvers.program import StepProgram, columns, step_program

ROWS = 3


def program(seed: int = 0, *, num_slots: int = 0, writes=None, zero: tuple[str, ...] = (), **options) -> StepProgram:
    """Every coefficient random in ±[0.2, 1.2] but those called in `zero` (and no scaling of the input if "s" is)."""
    rng = np.random.default_rng(seed)
    named = {}
    for name in columns(num_slots):
        values = rng.uniform(0.2, 1.2, ROWS) * rng.choice([-1, 1], ROWS)
        if name in ("log_var_min", "log_var_max"):
            values = np.sort(rng.uniform(-3, 0, (2, ROWS)), axis=0)[int(name == "log_var_max")]
        if name == "s":
            values = np.ones(ROWS) if name in zero else np.abs(values)
        elif name in zero:
            values = np.zeros(ROWS)
        named[name] = values
    return step_program(named, np.arange(ROWS), num_slots=num_slots, writes=writes, **options)


def keep(names: tuple[str, ...], num_slots: int = 0) -> tuple[str, ...]:
    """All columns but these, for `zero`."""
    return tuple(name for name in columns(num_slots) if name not in names)


# A few of each: what a call needs besides x and the model's output follows from the program.
PLAIN = program(1, zero=("c_e", "c_v", "s"))
CLIPPED = program(2, zero=("c_v", "s"), clip=(-1.0, 1.0))
THRESHOLD = program(3, zero=("c_e", "c_v"), threshold=(0.9, 2.0))
LEARNED = program(4, zero=("s",), variance="learned")
LEARNED_RANGE = program(5, variance="learned_range", clip=(-0.8, 0.9))
WRITES = np.array([[0, 2], [2, -1], [-1, 1]])
MULTISTEP = program(6, num_slots=3, writes=WRITES, zero=("c_e", "c_v"), clip=(-1.0, 1.0))

ALL = {
    "plain": PLAIN,
    "clipped": CLIPPED,
    "threshold": THRESHOLD,
    "learned": LEARNED,
    "learned_range": LEARNED_RANGE,
    "multistep": MULTISTEP,
}
