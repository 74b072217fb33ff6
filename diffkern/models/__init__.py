"""Networks and their checkpoints."""

from diffkern.models.atomic import atomic_write
from diffkern.models.checkpoints import CheckpointError, load_model, load_state, save_model
from diffkern.models.config import UNetConfig
from diffkern.models.unet import UNet

__all__ = ["CheckpointError", "UNet", "UNetConfig", "atomic_write", "load_model", "load_state", "save_model"]
