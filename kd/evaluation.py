"""Accuracy, counted over samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd.hardware import autocast, bring

_EVAL_BATCH = 1000


def evaluate(
    network: nn.Module, images: Tensor, labels: Tensor, precision: str, mean_of_batches: int | None = None
) -> float:
    """Top-1 accuracy in percent of uint8 images [sample, height, width, 3], counted exactly; leaves eval mode on.

    Images in main memory are brought to the labels' device.

    With `mean_of_batches` it is the mean of the accuracies of batches of that size, in which a smaller last batch
    weighs too much: what Trained Teacher's code reports.
    """
    network.eval()
    chunks = []
    with torch.inference_mode(), autocast(precision, labels.device.type):
        for start in range(0, len(labels), _EVAL_BATCH):
            batch = bring(images[start : start + _EVAL_BATCH], labels.device)
            logits = network(batch.permute(0, 3, 1, 2))
            chunks.append(logits.argmax(1) == labels[start : start + _EVAL_BATCH])
    hits = torch.cat(chunks).double()
    parts = torch.split(hits, mean_of_batches or len(hits))
    return round(100 * torch.stack([part.mean() for part in parts]).mean().item(), 4)
