"""A stand-in for the networks of EDM (arXiv 2206.00364), which are in no package index.

Names, attributes, constructor arguments and the order of operations are those that its users' code and checkpoints
rely on; the code is ours, after the paper. `test_peers_golden` holds it to numbers that the original produced.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import silu

from tests.fusion.peers.edm_layers import AttentionOp, Conv2d, FourierEmbedding, GroupNorm, Linear, PositionalEmbedding
from tests.fusion.peers.persistence import persistent_class


@persistent_class
class UNetBlock(nn.Module):
    def __init__(
        self,
        in_channels,
        out_channels,
        emb_channels,
        up=False,
        down=False,
        attention=False,
        num_heads=None,
        channels_per_head=64,
        dropout=0,
        skip_scale=1,
        eps=1e-5,
        resample_filter=(1, 1),
        resample_proj=False,
        adaptive_scale=True,
        init=None,
        init_zero=None,
        init_attn=None,
    ):
        super().__init__()
        init, init_zero = init or {}, init_zero or {"init_weight": 0}
        self.in_channels, self.out_channels, self.emb_channels = in_channels, out_channels, emb_channels
        self.num_heads = 0
        if attention:
            self.num_heads = out_channels // channels_per_head if num_heads is None else num_heads
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale
        resampling = {"up": up, "down": down, "resample_filter": resample_filter}

        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, **resampling, **init)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), **init)
        self.norm1 = GroupNorm(out_channels, eps=eps)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, **init_zero)
        self.skip = None
        if out_channels != in_channels or up or down:
            kernel = 1 if resample_proj or out_channels != in_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel=kernel, **resampling, **init)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, kernel=1, **(init_attn or init))
            self.proj = Conv2d(out_channels, out_channels, kernel=1, **init_zero)

    def forward(self, x, emb):
        residual = x
        x = self.conv0(silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            x = silu(torch.addcmul(shift, self.norm1(x), scale + 1))
        else:
            x = silu(self.norm1(x.add_(params)))
        x = self.conv1(F.dropout(x, p=self.dropout, training=self.training))
        x = x.add_(residual if self.skip is None else self.skip(residual)) * self.skip_scale
        if self.num_heads:
            n, c, height, width = x.shape
            qkv = self.qkv(self.norm2(x)).reshape(n * self.num_heads, c // self.num_heads, 3, height * width)
            q, k, v = qkv.unbind(2)
            attended = torch.einsum("nqk,nck->ncq", AttentionOp.apply(q, k), v)
            x = self.proj(attended.reshape(x.shape)).add_(x) * self.skip_scale
        return x


def dropped(labels, rate, training):
    """One-hot labels (N, label_dim), whole rows of which are zero with probability `rate` in training."""
    if not (training and rate):
        return labels
    return labels * (torch.rand([len(labels), 1], device=labels.device) >= rate).to(labels.dtype)


@persistent_class
class SongUNet(nn.Module):
    """DDPM++ and NCSN++ (arXiv 2011.13456)."""

    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,
        augment_dim=0,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        channel_mult_emb=4,
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.10,
        label_dropout=0,
        embedding_type="positional",
        channel_mult_noise=1,
        encoder_type="standard",
        decoder_type="standard",
        resample_filter=(1, 1),
    ):
        assert embedding_type in ("fourier", "positional")
        assert encoder_type in ("standard", "skip", "residual")
        assert decoder_type in ("standard", "skip")
        super().__init__()
        self.label_dropout = label_dropout
        emb, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        xavier = {"init_mode": "xavier_uniform"}
        tiny = {**xavier, "init_weight": 1e-5}
        filtered = {"resample_filter": resample_filter, **xavier}

        def block(inputs, outputs, **kwargs):
            scaled = {"skip_scale": math.sqrt(0.5), "eps": 1e-6, "adaptive_scale": False, "dropout": dropout}
            init = {"init": xavier, "init_zero": tiny, "init_attn": {**xavier, "init_weight": math.sqrt(0.2)}}
            filters = {"resample_filter": resample_filter, "resample_proj": True}
            return UNetBlock(inputs, outputs, emb, num_heads=1, **scaled, **init, **filters, **kwargs)

        positional = embedding_type == "positional"
        self.map_noise = PositionalEmbedding(noise, endpoint=True) if positional else FourierEmbedding(noise)
        self.map_label = Linear(label_dim, noise, **xavier) if label_dim else None
        self.map_augment = Linear(augment_dim, noise, bias=False, **xavier) if augment_dim else None
        self.map_layer0 = Linear(noise, emb, **xavier)
        self.map_layer1 = Linear(emb, emb, **xavier)

        self.enc = nn.ModuleDict()
        cout = caux = in_channels
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(cout, model_channels, kernel=3, **xavier)
                cout = model_channels
            else:
                self.enc[f"{res}x{res}_down"] = block(cout, cout, down=True)
                if encoder_type == "skip":
                    self.enc[f"{res}x{res}_aux_down"] = Conv2d(caux, caux, kernel=0, down=True, **filtered)
                    self.enc[f"{res}x{res}_aux_skip"] = Conv2d(caux, cout, kernel=1, **xavier)
                if encoder_type == "residual":
                    fused = Conv2d(caux, cout, kernel=3, down=True, fused_resample=True, **filtered)
                    self.enc[f"{res}x{res}_aux_residual"] = fused
                    caux = cout
            for index in range(num_blocks):
                cin, cout = cout, model_channels * mult
                self.enc[f"{res}x{res}_block{index}"] = block(cin, cout, attention=res in attn_resolutions)
        skips = [layer.out_channels for name, layer in self.enc.items() if "aux" not in name]

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            deepest = level == len(channel_mult) - 1
            if deepest:
                self.dec[f"{res}x{res}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(cout, cout)
            else:
                self.dec[f"{res}x{res}_up"] = block(cout, cout, up=True)
            for index in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                attention = index == num_blocks and res in attn_resolutions
                self.dec[f"{res}x{res}_block{index}"] = block(cin, cout, attention=attention)
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and not deepest:
                    aux_up = Conv2d(out_channels, out_channels, kernel=0, up=True, **filtered)
                    self.dec[f"{res}x{res}_aux_up"] = aux_up
                self.dec[f"{res}x{res}_aux_norm"] = GroupNorm(cout, eps=1e-6)
                self.dec[f"{res}x{res}_aux_conv"] = Conv2d(cout, out_channels, kernel=3, **tiny)

    def forward(self, x, noise_labels, class_labels, augment_labels=None):
        emb = self.map_noise(noise_labels)
        emb = emb.reshape(len(emb), 2, -1).flip(1).reshape(emb.shape)  # sines first
        if self.map_label is not None:
            labels = dropped(class_labels, self.label_dropout, self.training)
            emb = emb + self.map_label(labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = silu(self.map_layer1(silu(self.map_layer0(emb))))

        skips, aux = [], x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                aux = layer(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) / math.sqrt(2)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)

        out = normed = None
        for name, layer in self.dec.items():
            if "aux_up" in name:
                out = layer(out)
            elif "aux_norm" in name:
                normed = layer(x)
            elif "aux_conv" in name:
                here = layer(silu(normed))
                out = here if out is None else here + out
            else:
                if x.shape[1] != layer.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb)
        return out


@persistent_class
class DhariwalUNet(nn.Module):
    """ADM (arXiv 2105.05233)."""

    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,
        augment_dim=0,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        channel_mult_emb=4,
        num_blocks=3,
        attn_resolutions=(32, 16, 8),
        dropout=0.10,
        label_dropout=0,
    ):
        super().__init__()
        self.label_dropout = label_dropout
        emb = model_channels * channel_mult_emb
        third = math.sqrt(1 / 3)
        init = {"init_mode": "kaiming_uniform", "init_weight": third, "init_bias": third}
        zero = {"init_mode": "kaiming_uniform", "init_weight": 0, "init_bias": 0}

        def block(inputs, outputs, **kwargs):
            return UNetBlock(inputs, outputs, emb, dropout=dropout, init=init, init_zero=zero, **kwargs)

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, **zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb, **init)
        self.map_layer1 = Linear(emb, emb, **init)
        of_labels = {"init_mode": "kaiming_normal", "init_weight": math.sqrt(label_dim)}
        self.map_label = Linear(label_dim, emb, bias=False, **of_labels) if label_dim else None

        self.enc = nn.ModuleDict()
        cout = in_channels
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(cout, model_channels * mult, kernel=3, **init)
                cout = model_channels * mult
            else:
                self.enc[f"{res}x{res}_down"] = block(cout, cout, down=True)
            for index in range(num_blocks):
                cin, cout = cout, model_channels * mult
                self.enc[f"{res}x{res}_block{index}"] = block(cin, cout, attention=res in attn_resolutions)
        skips = [layer.out_channels for layer in self.enc.values()]

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(cout, cout)
            else:
                self.dec[f"{res}x{res}_up"] = block(cout, cout, up=True)
            for index in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), model_channels * mult
                self.dec[f"{res}x{res}_block{index}"] = block(cin, cout, attention=res in attn_resolutions)
        self.out_norm = GroupNorm(cout)
        self.out_conv = Conv2d(cout, out_channels, kernel=3, **zero)

    def forward(self, x, noise_labels, class_labels, augment_labels=None):
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(dropped(class_labels, self.label_dropout, self.training))
        emb = silu(emb)

        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if x.shape[1] != layer.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb)
        return self.out_conv(silu(self.out_norm(x)))
