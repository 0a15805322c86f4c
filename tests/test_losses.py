"""The losses against numbers worked out by hand, and their gradients against formulas."""

from math import exp, log

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kd.losses import LOSSES, CrossEntropy, Distill, TeachableTeacher, kl


def logits(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_kl_of_two_classes_by_hand() -> None:
    # At T=2, logits (2 ln 3, 0) are probabilities (3/4, 1/4) and (0, 0) are (1/2, 1/2).
    expected = 0.75 * log(1.5) + 0.25 * log(0.5)
    assert kl(logits([2 * log(3), 0]), logits([0, 0]), T=2).item() == pytest.approx(expected, abs=1e-12)


def test_kl_is_directed() -> None:
    p, q = logits([1, 0, -1]), logits([0, 2, 0])
    assert kl(p, q, T=1).item() != pytest.approx(kl(q, p, T=1).item())
    assert kl(p, p + 7, T=3).item() == pytest.approx(0, abs=1e-12)  # a shift is no difference


def test_reductions_differ_by_the_number_of_classes() -> None:
    p, q = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    assert kl(p, q, 4, "batchmean").item() == pytest.approx(7 * kl(p, q, 4, "mean").item())


def test_distill_by_hand() -> None:
    student, guide, labels = logits([0, 0], [0, 0]), logits([2 * log(3), 0], [0, 0]), torch.tensor([0, 1])
    parts = Distill(T=2, lam=0.25)(student, labels, guide)
    divergence = (0.75 * log(1.5) + 0.25 * log(0.5)) / 2
    assert parts["ce"].item() == pytest.approx(log(2))
    assert parts["kl"].item() == pytest.approx(divergence)
    assert parts["loss"].item() == pytest.approx(0.75 * log(2) + 0.25 * 4 * divergence)


def test_distill_gradient_is_the_difference_of_softmaxes() -> None:
    student = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    guide, labels = torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,))
    Distill(T=5, lam=0.3)(student, labels, guide)["loss"].backward()
    z = student.detach()
    hard = (z.softmax(1) - torch.nn.functional.one_hot(labels, 4)) / 6
    soft = 5 * ((z / 5).softmax(1) - (guide / 5).softmax(1)) / 6
    torch.testing.assert_close(student.grad, 0.7 * hard + 0.3 * soft)


@pytest.mark.parametrize("weight", [0.005, -0.04])
def test_teachable_teacher_gradient_flows_through_the_target(weight: float) -> None:
    teacher = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    reference, labels = torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,))
    TeachableTeacher(T=4, weight=weight)(teacher, labels, reference)["loss"].backward()
    z = teacher.detach()
    p, q = (z / 4).softmax(1), (reference / 4).softmax(1)
    ratio = (p / q).log()
    divergence = (p * ratio).sum(1, keepdim=True)
    hard = (z.softmax(1) - torch.nn.functional.one_hot(labels, 4)) / 6
    torch.testing.assert_close(teacher.grad, hard + weight * 4 * p * (ratio - divergence) / 6)


def test_a_nasty_teacher_is_rewarded_for_being_far() -> None:
    labels, reference, near, far = torch.tensor([0]), logits([1, 0]), logits([1, 0]), logits([1, -5])
    nasty = TeachableTeacher(T=1, weight=-10)
    assert nasty(far, labels, reference)["loss"] < nasty(near, labels, reference)["loss"]


def test_takd_released_loss_is_a_scaled_batchmean_loss() -> None:
    # NUMERICS: with s = (1−lam) + lam/C, loss_mean = s·[(1−lam_b)·CE + lam_b·T²·KL_batchmean], lam_b = (lam/C)/s.
    student, guide = torch.randn(8, 100, dtype=torch.float64), torch.randn(8, 100, dtype=torch.float64)
    labels, lam = torch.randint(100, (8,)), 0.5
    s = (1 - lam) + lam / 100
    assert s == pytest.approx(0.505)
    released = Distill(T=5, lam=lam, reduction="mean")(student, labels, guide)["loss"]
    usual = Distill(T=5, lam=lam / 100 / s)(student, labels, guide)["loss"]
    assert released.item() == pytest.approx(s * usual.item(), rel=1e-12)


def test_cross_entropy_by_hand() -> None:
    loss = CrossEntropy()(logits([1, 0, 0]), torch.tensor([0]))["loss"]
    assert loss.item() == pytest.approx(-log(exp(1) / (exp(1) + 2)))


def test_the_papers_losses_are_there() -> None:
    assert {"cross_entropy", "distill", "teachable_teacher"} <= LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_keeps_to_the_table(name: str) -> None:
    """It can be read from its record, it is a scalar with a gradient, and the order of the images does not matter.

    Numbers without a default are set to 0.5.
    """
    fields = LOSSES[name].model_fields
    assert fields["name"].default == name
    numbers = {f.serialization_alias or key: 0.5 for key, f in fields.items() if f.is_required()}
    loss = LOSSES[name].model_validate(numbers)
    assert LOSSES.parse(loss.dump()) == loss
    student, guide = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels, order = torch.randint(4, (6,)), torch.randperm(6)
    parts = loss(student, labels, guide.detach() if loss.guided else None)
    other = loss(student[order], labels[order], guide[order].detach() if loss.guided else None)
    assert all(part.shape == () and torch.isfinite(part) for part in parts.values())
    torch.testing.assert_close(parts["loss"], other["loss"])
    parts["loss"].backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def test_an_unknown_loss_is_no_traceback() -> None:
    with pytest.raises(ValueError, match="there are cross_entropy"):
        LOSSES.parse({"name": "gone"})


@pytest.mark.parametrize("bad", [{"T": 0, "lam": 0.5}, {"T": 1, "lam": 1.1}, {"T": float("nan"), "lam": 0}, {"T": 1}])
def test_ranges(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Distill(**bad)
