"""What a network answers to images, and its accuracy, counted over samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd.hardware import autocast, bring

_EVAL_BATCH = 1000


def predict(network: nn.Module, images: Tensor, device: torch.device, precision: str) -> Tensor:
    """Logits [sample, class] of uint8 images [sample, height, width, 3], on the network's device; leaves eval mode on.

    Images in main memory are brought there.
    """
    network.eval()
    with torch.inference_mode(), autocast(precision, device.type):
        batches = (bring(batch, device).permute(0, 3, 1, 2) for batch in torch.split(images, _EVAL_BATCH))
        return torch.cat([network(batch) for batch in batches])


def evaluate(
    network: nn.Module, images: Tensor, labels: Tensor, precision: str, mean_of_batches: int | None = None
) -> float:
    """Top-1 accuracy in percent of uint8 images [sample, height, width, 3], counted exactly; leaves eval mode on.

    Images in main memory are brought to the labels' device.

    With `mean_of_batches` it is the mean of the accuracies of batches of that size, in which a smaller last batch
    weighs too much: what Trained Teacher's code reports.
    """
    hits = (predict(network, images, labels.device, precision).argmax(1) == labels).double()
    parts = torch.split(hits, mean_of_batches or len(hits))
    return round(100 * torch.stack([part.mean() for part in parts]).mean().item(), 4)
