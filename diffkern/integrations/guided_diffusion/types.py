"""What a network predicts, whose variance a reverse step has, and which loss trains it."""

from __future__ import annotations

import enum


class ModelMeanType(enum.Enum):
    """What the network's first C channels are."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t−1}
    START_X = enum.auto()  # x0
    EPSILON = enum.auto()  # ε


class ModelVarType(enum.Enum):
    """The variance of p(x_{t−1} | x_t). The learned ones are the network's further C channels."""

    LEARNED = enum.auto()  # their value is its logarithm
    FIXED_SMALL = enum.auto()  # β̃_t
    FIXED_LARGE = enum.auto()  # β_t, but β̃_1 at t = 0
    LEARNED_RANGE = enum.auto()  # −1 is log β̃_t and 1 is log β_t


class LossType(enum.Enum):
    """What training minimises; sampling does not look at it."""

    MSE = enum.auto()  # squared error, with a learned variance beside the bound, which trains that alone
    RESCALED_MSE = enum.auto()  # the same with T/1000 of the bound
    KL = enum.auto()  # the bound's term, bits/dim
    RESCALED_KL = enum.auto()  # T times it: an estimate of the whole bound

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound itself."""
        return self in (LossType.KL, LossType.RESCALED_KL)


def check_types(model_mean_type: object, model_var_type: object) -> None:
    """ValueError unless both are members of the enums here: another package's of the same names are not equal to them.

    It is asked when a network's output is read, since a subclass may read it by itself and know other types.
    """
    _check_member("model_mean_type", model_mean_type, ModelMeanType)
    _check_member("model_var_type", model_var_type, ModelVarType)


def check_loss_type(loss_type: object) -> None:
    """The same of the loss's type, when a loss is computed."""
    _check_member("loss_type", loss_type, LossType)


def _check_member(name: str, value: object, kind: type[enum.Enum]) -> None:
    if not isinstance(value, kind):
        known = ", ".join(map(str, kind))
        raise ValueError(f"{name} is {value!r}; it may be one of {known}, of {kind.__module__}")
