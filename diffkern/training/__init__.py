"""Training: the ``Trainer``, its configuration, its datasets and its checkpoints."""

from diffkern.training.checkpoint import find_checkpoint
from diffkern.training.config import TrainConfig, TrainResult
from diffkern.training.data import Digits, ImageDataset, ImageFolder, NpzImages, Split, open_data
from diffkern.training.interrupt import TrainingInterrupted
from diffkern.training.learned_schedule import LearnedSchedule
from diffkern.training.log_snr import LearnedLogSNR
from diffkern.training.trainer import Trainer

__all__ = [
    "Digits",
    "ImageDataset",
    "ImageFolder",
    "LearnedLogSNR",
    "LearnedSchedule",
    "NpzImages",
    "Split",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TrainingInterrupted",
    "find_checkpoint",
    "open_data",
]
