"""The U-Net of DDPM, improved-diffusion and guided-diffusion: one network, from an image and a time to an image.

It reads as it runs: an encoder that keeps every intermediate result, a middle, and a decoder that takes them back in
reverse order. What differs between the three families is in `UNetConfig`.

    Ho, Jain, Abbeel 2020 (DDPM) · Nichol & Dhariwal 2021 (improved) · Dhariwal & Nichol 2021 (guided)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffkern.models.config import UNetConfig
from diffkern.nn import Attention, Downsample, GroupNorm, ResBlock, Upsample, sinusoidal_embedding, zero_init
from diffkern.nn.resblock import Resample


class Stage(nn.Module):
    """The named modules in turn (those that are None are left out); residual blocks are given the embedding too."""

    def __init__(self, **modules: nn.Module | None) -> None:
        super().__init__()
        for name, module in modules.items():
            if module is not None:
                self.add_module(name, module)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        for module in self.children():
            h = module(h, emb) if isinstance(module, ResBlock) else module(h)
        return h


class UNet(nn.Module):
    """A U-Net built from ``config``.

    State-dict keys: ``time_mlp.{0,2}``, ``label_embedding``, ``conv_in``, ``encoder.I.{block,attention,resample}``,
    ``middle.{block1,attention,block2}``, ``decoder.I.{block,attention,resample}``, ``norm_out``, ``conv_out``.
    The stages are `UNetModel`'s: ``encoder.I`` is its ``input_blocks.(I + 1)``, ``decoder.I`` its ``output_blocks.I``.

    ``num_classes`` is the config's (None: unconditional), ``self_condition`` too: by them a `Trainer` and a `Sampler`
    know what to give it. ``gradient_checkpointing`` may be switched at any time.
    A fresh network returns zeros: its last convolution starts at zero.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.self_condition = config.self_condition
        self.gradient_checkpointing = config.gradient_checkpointing
        emb_channels = 4 * config.channels

        def res_block(in_channels: int, out_channels: int, resample: Resample | None = None) -> ResBlock:
            return ResBlock(
                in_channels,
                out_channels,
                emb_channels,
                num_groups=config.num_groups,
                eps=config.norm_eps,
                dropout=config.dropout,
                scale_shift=config.scale_shift_norm,
                resample=resample,
            )

        def attention(channels: int) -> Attention:
            return Attention(
                channels,
                num_heads=config.num_heads,
                num_head_channels=config.num_head_channels,
                order=config.qkv_order,
                num_groups=config.num_groups,
                eps=config.norm_eps,
            )

        def attention_at(level: int) -> Attention | None:
            return attention(config.widths[level]) if 2**level in config.attention_resolutions else None

        def downsample(channels: int) -> nn.Module:
            if config.resblock_updown:
                return res_block(channels, channels, "down")
            return Downsample(channels, config.downsample_padding)

        def upsample(channels: int) -> nn.Module:
            return res_block(channels, channels, "up") if config.resblock_updown else Upsample(channels)

        self.time_mlp = nn.Sequential(
            nn.Linear(config.channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if config.num_classes is not None:
            self.label_embedding = nn.Embedding(config.num_classes + config.null_label, emb_channels)

        width = config.widths[0]
        self.conv_in = nn.Conv2d(config.in_channels * (2 if config.self_condition else 1), width, 3, padding=1)
        skips = [width]

        self.encoder = nn.ModuleList()
        for level, out in enumerate(config.widths):
            if level > 0:
                self.encoder.append(Stage(resample=downsample(width)))
                skips.append(width)
            for _ in range(config.num_res_blocks):
                self.encoder.append(Stage(block=res_block(width, out), attention=attention_at(level)))
                width = out
                skips.append(width)

        self.middle = Stage(block1=res_block(width, width), attention=attention(width), block2=res_block(width, width))

        self.decoder = nn.ModuleList()
        for level, out in reversed(list(enumerate(config.widths))):
            for i in range(config.num_res_blocks + 1):
                block = res_block(width + skips.pop(), out)
                width = out
                leaves_level = i == config.num_res_blocks and level > 0
                resample = upsample(width) if leaves_level else None
                self.decoder.append(Stage(block=block, attention=attention_at(level), resample=resample))

        self.norm_out = GroupNorm(config.num_groups, width, config.norm_eps, activation="silu")
        self.conv_out = zero_init(nn.Conv2d(width, config.out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, x_self_cond: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), or (N, 2C, H, W) with learned Σ.

        x: images in the dtype of the parameters (any under autocast); H and W multiples of `UNetConfig.size_multiple`.
        t: (N,), integer or floating: the time in steps, 0-based.
        y: int64 or int32 labels (N,), exactly if the model is class-conditional; ``num_classes`` is the null label.
        x_self_cond: with ``self_condition``, the x0 that was predicted before, like x; None is zeros: nothing yet.

        Raises ``ValueError`` or ``TypeError`` naming the argument. Labels out of range raise on a CPU.
        """
        self._check(x, t, y)
        self._check_self_cond(x, x_self_cond)
        emb = self._embed(t, y)

        if self.self_condition:
            x = torch.cat([torch.zeros_like(x) if x_self_cond is None else x_self_cond, x], dim=1)
        h = self.conv_in(x)
        skips = [h]
        for stage in self.encoder:
            h = self._run(stage, h, emb)
            skips.append(h)
        h = self._run(self.middle, h, emb)
        for stage in self.decoder:
            h = self._run_with_skip(stage, h, skips.pop(), emb)
        return self.conv_out(self.norm_out(h))

    def _embed(self, t: Tensor, y: Tensor | None) -> Tensor:
        """silu(time + label), (N, 4·channels): computed once, as every block's projection starts with that SiLU."""
        emb = sinusoidal_embedding(
            t, self.config.channels, order=self.config.embedding_order, freq_shift=self.config.freq_shift
        )
        emb = self.time_mlp(emb.to(self.conv_in.weight.dtype))
        if y is not None:
            emb = emb + self.label_embedding(y)
        return nn.functional.silu(emb)

    def _run(self, stage: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, h, emb, use_reentrant=False)
        return stage(h, emb)

    def _run_with_skip(self, stage: nn.Module, h: Tensor, skip: Tensor, emb: Tensor) -> Tensor:
        return self._run(stage, torch.cat([h, skip], dim=1), emb)

    def _check(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        channels, multiple = self.config.in_channels, self.config.size_multiple
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"x must be (N, {channels}, H, W), not {tuple(x.shape)}")
        size = tuple(x.shape[2:])
        if min(size) < 1 or any(length % multiple for length in size):
            raise ValueError(f"x must have a height and width that are multiples of {multiple}, not {size}")
        if t.shape != x.shape[:1] or t.device != x.device:
            raise ValueError(f"t must be ({len(x)},) on {x.device} as x is, not {tuple(t.shape)} on {t.device}")
        if self.num_classes is None:
            if y is not None:
                raise ValueError("y must be None: this model has no classes (UNetConfig.num_classes)")
            return
        if y is None:
            raise ValueError(f"y must be given: this model is conditional on {self.num_classes} classes")
        if y.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"y must hold int64 or int32 labels, not {y.dtype}")
        if y.shape != x.shape[:1] or y.device != x.device:
            raise ValueError(f"y must be ({len(x)},) on {x.device} as x is, not {tuple(y.shape)} on {y.device}")
        # On a GPU this would wait for the device, and in a compiled graph break it.
        if y.device.type == "cpu" and len(y) and not torch.compiler.is_compiling():
            labels = self.label_embedding.num_embeddings
            if not 0 <= int(y.min()) <= int(y.max()) < labels:
                raise ValueError(f"y must be in [0, {labels - 1}], not {int(y.min())} … {int(y.max())}")

    def _check_self_cond(self, x: Tensor, x_self_cond: Tensor | None) -> None:
        if x_self_cond is None:
            return
        if not self.self_condition:
            raise ValueError("x_self_cond must be None: this model takes no x0 (UNetConfig.self_condition)")
        if (x_self_cond.shape, x_self_cond.dtype, x_self_cond.device) != (x.shape, x.dtype, x.device):
            raise ValueError(
                f"x_self_cond must be {x.dtype} {tuple(x.shape)} on {x.device} as x is, "
                f"not {x_self_cond.dtype} {tuple(x_self_cond.shape)} on {x_self_cond.device}"
            )
