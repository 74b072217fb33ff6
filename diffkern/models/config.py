"""What a `UNet` is made of, as a value: frozen, comparable, JSON-serialisable, with the published models as presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from diffkern.nn import EmbeddingOrder, Padding, QKVOrder

_SWITCHES = (
    "scale_shift_norm",
    "resblock_updown",
    "learn_sigma",
    "self_condition",
    "null_label",
    "gradient_checkpointing",
)


@dataclass(frozen=True)
class UNetConfig:
    """The architecture of a `UNet`.

    Raises ``TypeError`` or ``ValueError`` naming the field. The first four fields have no default: they are the model.
    """

    in_channels: int
    """Channels of the image."""
    channels: int
    """Width at full resolution, before its multiplier; also the length of the sinusoidal time embedding: even."""
    channel_mult: tuple[float, ...]
    """One multiplier of ``channels`` per level; every level after the first halves the resolution."""
    num_res_blocks: int
    """Residual blocks per level of the encoder; the decoder has one more."""
    attention_resolutions: tuple[int, ...] = ()
    """Downsampling rates (1, 2, 4, …) at which every residual block is followed by attention, as in `UNetModel` of
    guided-diffusion: 2 means 16×16 for a 32×32 image. The middle always has attention."""
    num_heads: int = 1
    """Attention heads, where ``num_head_channels`` is not given."""
    num_head_channels: int | None = None
    """Channels per head: the number of heads then follows the width."""
    qkv_order: QKVOrder = "hqkvc"
    """Channel order of the packed projection; see `diffkern.nn.Attention`."""
    scale_shift_norm: bool = False
    """Time enters as GN(h)·(1 + scale) + shift; otherwise it is added before the norm."""
    resblock_updown: bool = False
    """Resample inside residual blocks, without weights; otherwise by a convolution between them."""
    downsample_padding: Padding = "symmetric"
    """Of the stride-2 convolution: "symmetric", or "tf_same" as in the original DDPM."""
    embedding_order: EmbeddingOrder = "cos_sin"
    """Halves of the sinusoidal time embedding."""
    freq_shift: int = 0
    """0: frequencies 10000^(−i/half); 1: 10000^(−i/(half − 1)), which ends exactly at 1/10000."""
    num_groups: int = 32
    """Of every GroupNorm: divides every width, and every sum of a decoder's width and its skip's."""
    norm_eps: float = 1e-5
    """Added to the variance in every GroupNorm."""
    dropout: float = 0.0
    """Probability, before the last convolution of every residual block."""
    learn_sigma: bool = False
    """Twice the output channels: [mean; variance] on axis 1."""
    self_condition: bool = False
    """Take the x0 that was predicted before as an input beside x (Chen et al. 2022, arXiv 2208.04202): the first
    convolution has twice the channels, [x0; x]."""
    num_classes: int | None = None
    """Class-conditional on labels 0 … num_classes − 1."""
    null_label: bool = False
    """One label more, ``num_classes``, that stands for "no class": what classifier-free guidance needs."""
    gradient_checkpointing: bool = False
    """Recompute every block in the backward pass instead of storing its activations. Same gradients."""

    def __post_init__(self) -> None:
        # JSON and command lines bring lists; a frozen value holds tuples.
        for name in ("channel_mult", "attention_resolutions"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)):
                raise TypeError(f"{name} must be a tuple of numbers, not {value!r}")
            for number in value:
                _require_number(name, number)
            object.__setattr__(self, name, tuple(value))
        for name in ("in_channels", "channels", "num_res_blocks", "num_heads", "num_groups"):
            _require_positive_int(name, getattr(self, name))
        for name in ("num_head_channels", "num_classes"):
            if getattr(self, name) is not None:
                _require_positive_int(name, getattr(self, name))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        _require_one_of("qkv_order", self.qkv_order, get_args(QKVOrder))
        _require_one_of("downsample_padding", self.downsample_padding, get_args(Padding))
        _require_one_of("embedding_order", self.embedding_order, get_args(EmbeddingOrder))
        _require_one_of("freq_shift", self.freq_shift, (0, 1))
        if self.channels % 2:
            raise ValueError(f"channels must be even, not {self.channels}: half of the embedding are sines")
        if not self.channel_mult or any(mult <= 0 or mult * self.channels % 1 for mult in self.channel_mult):
            raise ValueError(
                f"channel_mult must be one or more numbers that make channels = {self.channels} "
                f"a positive integer, not {self.channel_mult}"
            )
        rates = [2**level for level in range(len(self.channel_mult))]
        if not set(self.attention_resolutions) <= set(rates):
            raise ValueError(
                f"attention_resolutions must be downsampling rates out of {rates}, not {self.attention_resolutions}"
            )
        for name in ("dropout", "norm_eps"):
            _require_number(name, getattr(self, name))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, not {self.norm_eps}")
        if self.null_label and self.num_classes is None:
            raise ValueError("null_label needs num_classes: a model without classes has no labels")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, full resolution first."""
        return tuple(int(mult * self.channels) for mult in self.channel_mult)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def size_multiple(self) -> int:
        """Height and width of an image must be multiples of this: 2^(levels − 1)."""
        return 2 ** (len(self.channel_mult) - 1)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as values that JSON knows."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """The inverse of `to_dict`; fields that have a default may be left out.

        Raises ``ValueError`` with the names of unknown and missing keys, and what the constructor raises.
        """
        fields = dataclasses.fields(cls)
        unknown = sorted(set(values) - {field.name for field in fields})
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
        if unknown or missing:
            known = ", ".join(field.name for field in fields)
            raise ValueError(f"UNetConfig: unknown keys {unknown}, missing keys {missing}; it knows {known}")
        return cls(**values)

    @classmethod
    def ddpm_cifar10(cls) -> UNetConfig:
        """Ho et al. 2020, CIFAR-10, in the arrangement of its TensorFlow code: 35,746,307 parameters."""
        return cls(
            in_channels=3,
            channels=128,
            channel_mult=(1, 2, 2, 2),
            num_res_blocks=2,
            attention_resolutions=(2,),
            downsample_padding="tf_same",
            embedding_order="sin_cos",
            freq_shift=1,
            norm_eps=1e-6,
            dropout=0.1,
        )

    @classmethod
    def improved_cifar10(cls) -> UNetConfig:
        """Nichol & Dhariwal 2021, CIFAR-10 with learned Σ: 52.5 M parameters."""
        return cls(
            in_channels=3,
            channels=128,
            channel_mult=(1, 2, 2, 2),
            num_res_blocks=3,
            attention_resolutions=(2, 4),
            num_heads=4,
            scale_shift_norm=True,
            dropout=0.3,
            learn_sigma=True,
        )

    @classmethod
    def guided_imagenet64(cls) -> UNetConfig:
        """Dhariwal & Nichol 2021, class-conditional ImageNet 64×64: 295.9 M parameters."""
        return cls(
            in_channels=3,
            channels=192,
            channel_mult=(1, 2, 3, 4),
            num_res_blocks=3,
            attention_resolutions=(2, 4, 8),
            num_head_channels=64,
            qkv_order="qkvhc",
            scale_shift_norm=True,
            resblock_updown=True,
            dropout=0.1,
            learn_sigma=True,
            num_classes=1000,
        )

    @classmethod
    def digits(cls) -> UNetConfig:
        """8×8 handwritten digits, class-conditional with a null label: 0.7 M parameters, for a CPU."""
        return cls(
            in_channels=1,
            channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            num_heads=2,
            scale_shift_norm=True,
            num_groups=8,
            num_classes=10,
            null_label=True,
        )


def _require_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number or numbers, not {value!r}")


def _require_positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")


def _require_one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
