"""A network, a process and images small enough that a training step takes a millisecond."""

import multiprocessing

import torch
from torch import nn

from diffkern.process import GaussianProcess, linear_betas
from diffkern.training import TrainConfig, Trainer
from diffkern.training.loss import TrainingLoss
from diffkern.training.objective import make_objective

CLASSES = 3

# Children start from a server that has already imported what takes seconds to import.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["accelerate", "safetensors.torch", "tqdm", "diffkern.training"])


class TinyNet(nn.Module):
    """Two convolutions with dropout between, and labels. It is no U-Net: the Trainer takes any network."""

    num_classes = CLASSES

    def __init__(self, width=4, dropout=0.3):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.labels = nn.Embedding(CLASSES + 1, width)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x, t, y):
        h = self.first(x) + self.labels(y)[:, :, None, None] + t[:, None, None, None] / 1000
        return self.last(self.dropout(torch.tanh(h)))


class Conditioned(TinyNet):
    """The tiny network, always with the same weights, and x_self_cond added to x by a convolution of its own."""

    self_condition = True

    def __init__(self, dropout=0.3, out_channels=1):
        torch.manual_seed(1)
        super().__init__(dropout=dropout)
        self.known = nn.Conv2d(1, 1, 1)
        self.last = nn.Conv2d(4, out_channels, 3, padding=1)

    def forward(self, x, t, y, x_self_cond=None):
        return super().forward(x + self.known(torch.zeros_like(x) if x_self_cond is None else x_self_cond), t, y)


def tiny_process(**kwargs):
    return GaussianProcess(linear_betas(100), **kwargs)


def tiny_loss(process=None, *, null_label=None, label_dropout=0.0, **config):
    """The loss of a run with seed 3 on data of 17 grey levels."""
    process = process or tiny_process()
    settings = TrainConfig(**config)
    objective = make_objective(settings, process, levels=17, takes_self_cond=settings.self_conditioning > 0)
    device = torch.device("cpu")
    return TrainingLoss(process, objective, seed=3, null_label=null_label, label_dropout=label_dropout, device=device)


def tiny_data(count=20):
    images = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return [(image, index % CLASSES) for index, image in enumerate(images)]


def tiny_trainer(output=None, *, model=None, data=None, process=None, **config):
    if model is None:
        torch.manual_seed(1)
        model = TinyNet()
    defaults = {"batch_size": 8, "lr": 1e-2, "warmup_steps": 4, "label_dropout": 0.3, "progress": False}
    data = tiny_data() if data is None else data
    return Trainer(model, process or tiny_process(), data, TrainConfig(output=output, **{**defaults, **config}))


def assert_same(one, other):
    """Every tensor of two state dicts, bit for bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
