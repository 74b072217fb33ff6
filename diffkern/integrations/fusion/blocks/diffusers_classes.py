"""The classes that are swapped into diffusers' models: importable, so that what is pickled names them."""

from diffusers.models import attention_processor, resnet, upsampling
from diffusers.models.unets import unet_2d_blocks

from diffkern.integrations.fusion.blocks import diffusers as blocks
from diffkern.integrations.fusion.blocks import diffusers_attention as attention
from diffkern.integrations.fusion.blocks import diffusers_decoder as decoder


class ResnetBlock2D(blocks.ResnetMethod, resnet.ResnetBlock2D):
    origin = resnet.ResnetBlock2D


class FoldedResnetBlock2D(blocks.FoldedResnetMethod, resnet.ResnetBlock2D):
    origin = resnet.ResnetBlock2D


class Upsample2D(blocks.UpsampleMethod, upsampling.Upsample2D):
    origin = upsampling.Upsample2D


class Attention(attention.AttentionMethod, attention_processor.Attention):
    origin = attention_processor.Attention


class UpBlock2D(decoder.UpBlockMethod, unet_2d_blocks.UpBlock2D):
    origin = unet_2d_blocks.UpBlock2D


class AttnUpBlock2D(decoder.AttnUpBlockMethod, unet_2d_blocks.AttnUpBlock2D):
    origin = unet_2d_blocks.AttnUpBlock2D


class CrossAttnUpBlock2D(decoder.CrossAttnUpBlockMethod, unet_2d_blocks.CrossAttnUpBlock2D):
    origin = unet_2d_blocks.CrossAttnUpBlock2D
