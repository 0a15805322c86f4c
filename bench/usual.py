"""The usual distillation script, as the papers' code has it: the baseline of bench/speed.py and bench/gpu.py.

PIL images through torchvision's transforms in a DataLoader of two workers, fp32, the teacher's forward in the graph of
every step, the loss read after each one.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax, softmax
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

_T, _LAMBDA = 4.0, 0.5


class Images(Dataset[tuple[torch.Tensor, int]]):
    """uint8 images [sample, 32, 32, 3] as torchvision's CIFAR10 serves them."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def loss_of(output: torch.Tensor, taught: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits [sample, class]; with a teacher's logits, together with KL."""
    loss = cross_entropy(output, target)
    if taught is None:
        return loss
    divergence = nn.functional.kl_div(log_softmax(output / _T, 1), softmax(taught / _T, 1), reduction="batchmean")
    return (1 - _LAMBDA) * loss + _LAMBDA * _T**2 * divergence


def images_per_second(
    student: nn.Module,
    teacher: nn.Module | None,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    steps: int,
    device: str = "cpu",
) -> float:
    """Training speed over `steps` batches of 128 after two that do not count."""
    student.to(device)
    loader = DataLoader(Images(images, labels), batch_size=128, shuffle=True, num_workers=2)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, 0.9, weight_decay=1e-4)
    student.train()
    if teacher is not None:
        teacher.to(device).eval()
    began, seen = 0.0, 0
    for step, (batch, target) in enumerate(loader):
        if step == 2:
            began = time.perf_counter()
        batch, target = batch.to(device), target.to(device)
        optimizer.zero_grad()
        output = student(batch)
        loss = loss_of(output, None if teacher is None else teacher(batch), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss.item()
        if step >= 2:
            seen += len(target)
        if step == steps + 1:
            break
    return seen / (time.perf_counter() - began)
