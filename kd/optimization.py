"""How weights move: a training's optimiser, and its learning rate over the epochs."""

from __future__ import annotations

from math import cos, pi

import torch
from torch import nn

from kd.stage import TrainSpec


def learning_rate(train: TrainSpec, epoch: int) -> float:
    """The learning rate of an epoch counted from 0, after `warmup` epochs of linear increase."""
    if epoch < train.warmup:
        return train.lr * (epoch + 1) / (train.warmup + 1)
    if train.schedule == "step":
        passed = sum(epoch >= round(fraction * train.epochs) for fraction in train.milestones)
        return train.lr * train.gamma**passed
    if train.schedule == "cosine":
        return train.lr * (1 + cos(pi * (epoch - train.warmup) / (train.epochs - train.warmup))) / 2
    return train.lr


def make_optimizer(network: nn.Module, train: TrainSpec) -> torch.optim.Optimizer:
    """The optimiser over all parameters, weight decay on every one of them as in both papers' code."""
    if train.optimizer == "adam":
        return torch.optim.Adam(network.parameters(), train.lr, weight_decay=train.weight_decay, fused=True)
    return torch.optim.SGD(
        network.parameters(),
        train.lr,
        train.momentum,
        weight_decay=train.weight_decay,
        nesterov=train.nesterov,
        fused=True,
    )
