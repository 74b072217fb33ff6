"""The classes that are swapped into diffusers' models: importable, so that what is pickled names them."""

from diffusers.models import resnet

from diffkern.integrations.fusion.blocks import diffusers as methods


class ResnetBlock2D(methods.ResnetMethod, resnet.ResnetBlock2D):
    origin = resnet.ResnetBlock2D
