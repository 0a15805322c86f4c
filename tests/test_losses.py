"""The losses on logits: against numbers by hand and from other code, identities, and extreme logits.

The losses on features are in tests/test_feature_losses.py.
"""

from __future__ import annotations

from math import exp, log
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, one_hot

from kd.app.parsing import parse
from kd.core.spec import KnownError
from kd.core.stage import Batch, Formula, Outputs
from kd.losses import LOSSES, CrossEntropy, Distill, TeachableTeacher, kl
from kd.losses.dist import DIST, correlation
from kd.losses.distillation import standardized
from kd.losses.dkd import DKD, others
from kd.losses.nkd import NKD
from kd.losses.wsld import WSLD
from kd.methods.method import LossChoice
from tests.conftest import ROOT, composed

OURS = ["dkd", "dist", "nkd", "wsld", "label_smoothing", "tf_kd"]
LOGIT = [name for name in LOSSES if LOSSES[name].needs <= {"logits"}]
GUIDED = [name for name in LOGIT if LOSSES[name].needs]


def logits(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def batch(net: Tensor, labels: Tensor, guide: Tensor | None = None, epoch: int = 0) -> Batch:
    guided = Outputs({} if guide is None else {"logits": guide})
    return Batch(labels, torch.arange(len(labels)), Outputs({"logits": net}), guided, epoch)


def loss_of(name: str, **numbers: Any) -> Formula:
    """A loss by name. Numbers without a default are set to 0.5, and T to 4."""
    required = {f.serialization_alias or key: f for key, f in LOSSES[name].model_fields.items() if f.is_required()}
    loss = LOSSES[name].model_validate(
        {**dict.fromkeys(required, 0.5), **({"T": 4.0} if "T" in required else {}), **numbers}
    )
    assert isinstance(loss, Formula)
    return loss


def gradient(loss: Formula, net: Tensor, labels: Tensor, guide: Tensor | None = None, epoch: int = 0) -> Tensor:
    net = net.clone().requires_grad_()
    loss(batch(net, labels, guide, epoch))["loss"].backward()  # type: ignore[no-untyped-call]
    assert net.grad is not None
    return net.grad


def drawn(seed: int, samples: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of net and guide with a deviation of 3, and labels."""
    generator = torch.Generator().manual_seed(seed)
    net, guide = 3 * torch.randn(2, samples, classes, dtype=torch.float64, generator=generator)
    return net, guide, torch.randint(classes, (samples,), generator=generator)


# By hand


def test_kl_of_two_classes_by_hand() -> None:
    # At T=2, logits (2 ln 3, 0) are probabilities (3/4, 1/4) and (0, 0) are (1/2, 1/2).
    expected = 0.75 * log(1.5) + 0.25 * log(0.5)
    assert kl(logits([2 * log(3), 0]), logits([0, 0]), T=2).item() == pytest.approx(expected, abs=1e-12)


def test_kl_is_directed() -> None:
    p, q = logits([1, 0, -1]), logits([0, 2, 0])
    assert kl(p, q, T=1).item() != pytest.approx(kl(q, p, T=1).item())
    assert kl(p, p + 7, T=3).item() == pytest.approx(0, abs=1e-12)  # a shift is no difference


def test_reductions_differ_by_the_number_of_classes() -> None:
    p, q, _ = drawn(0, 5, 7)
    assert kl(p, q, 4, "batchmean").item() == pytest.approx(7 * kl(p, q, 4, "mean").item())


def test_distill_by_hand() -> None:
    student, guide, labels = logits([0, 0], [0, 0]), logits([2 * log(3), 0], [0, 0]), torch.tensor([0, 1])
    divergence = (0.75 * log(1.5) + 0.25 * log(0.5)) / 2
    for weight in (1, 10):
        parts = Distill(T=2, lam=0.25, weight=weight)(batch(student, labels, guide))
        assert parts["ce"].item() == pytest.approx(log(2))
        assert parts["kl"].item() == pytest.approx(divergence)
        assert parts["loss"].item() == pytest.approx(0.75 * log(2) + weight * 0.25 * 4 * divergence)


def test_distill_gradient_is_the_difference_of_softmaxes() -> None:
    z, guide, labels = drawn(1, 6, 4)
    hard = (z.softmax(1) - one_hot(labels, 4)) / 6
    soft = 5 * ((z / 5).softmax(1) - (guide / 5).softmax(1)) / 6
    torch.testing.assert_close(gradient(Distill(T=5, lam=0.3), z, labels, guide), 0.7 * hard + 0.3 * soft)


@pytest.mark.parametrize("weight", [0.005, -0.04])
def test_teachable_teacher_gradient_flows_through_the_target(weight: float) -> None:
    z, reference, labels = drawn(2, 6, 4)
    p, q = (z / 4).softmax(1), (reference / 4).softmax(1)
    ratio = (p / q).log()
    divergence = (p * ratio).sum(1, keepdim=True)
    hard = (z.softmax(1) - one_hot(labels, 4)) / 6
    found = gradient(TeachableTeacher(T=4, weight=weight), z, labels, reference)
    torch.testing.assert_close(found, hard + weight * 4 * p * (ratio - divergence) / 6)


def test_a_nasty_teacher_is_rewarded_for_being_far() -> None:
    labels, reference, near, far = torch.tensor([0]), logits([1, 0]), logits([1, 0]), logits([1, -5])
    nasty = TeachableTeacher(T=1, weight=-10)
    assert nasty(batch(far, labels, reference))["loss"] < nasty(batch(near, labels, reference))["loss"]


def test_takd_released_loss_is_a_scaled_batchmean_loss() -> None:
    # NUMERICS: with s = (1−lam) + lam/C, loss_mean = s·[(1−lam_b)·CE + lam_b·T²·KL_batchmean], lam_b = (lam/C)/s.
    student, guide, labels = drawn(3, 8, 100)
    lam = 0.5
    s = (1 - lam) + lam / 100
    assert s == pytest.approx(0.505)
    released = Distill(T=5, lam=lam, reduction="mean")(batch(student, labels, guide))["loss"]
    usual = Distill(T=5, lam=lam / 100 / s)(batch(student, labels, guide))["loss"]
    assert released.item() == pytest.approx(s * usual.item(), rel=1e-12)


def test_cross_entropy_by_hand() -> None:
    loss = CrossEntropy()(batch(logits([1, 0, 0]), torch.tensor([0])))["loss"]
    assert loss.item() == pytest.approx(-log(exp(1) / (exp(1) + 2)))


def test_others_are_the_columns_without_the_labels() -> None:
    found = others(logits([1, 2, 3], [4, 5, 6], [7, 8, 9]), torch.tensor([0, 1, 2]))
    assert found.tolist() == [[2, 3], [4, 6], [7, 8]]


# Numbers from other code (METHODS.md, section 2.9): of both batches, in float64

A = (
    logits([1, 2, 0.5], [0, -1, 3]),
    torch.tensor([0, 2]),
    logits([2, 1, -1], [0.5, 0, 4]),
)
B = (
    logits([1, 2, 0.5, -0.5], [0, -1, 3, 1], [2, 0, -2, 1]),
    torch.tensor([0, 2, 1]),
    logits([3, 1, -1, 0], [0.5, 0, 4, -2], [-1, 2, 0, 1]),
)
WARM: dict[str, Any] = {"ce": 0, "warmup": 0}  # DKD without CE and warm-up

# Name, numbers, part, factor of the part, values of A and B
GOLDEN: list[tuple[str, dict[str, Any], str, float, float, float]] = [
    ("cross_entropy", {}, "loss", 1, 0.765126343933, 1.373191354807),
    ("distill", {"T": 4, "lambda": 1}, "loss", 1, 0.307939859426, 1.306151544231),
    ("distill", {"T": 1, "lambda": 1}, "loss", 1, 0.256338446209, 0.777971072080),
    ("distill", {"T": 4, "lambda": 1, "reduction": "mean"}, "loss", 1, 0.102646619809, 0.326537886058),
    ("distill", {"T": 4, "lambda": 0.9}, "loss", 1, 0.353658507877, 1.312855525288),
    ("dkd", {"T": 4, **WARM}, "tckd", 16, 0.292876497331, 0.600416667517),
    ("dkd", {"T": 4, **WARM}, "nckd", 16, 0.030343273999, 1.202687812548),
    ("dkd", {"T": 4, **WARM, "alpha": 1, "beta": 8}, "loss", 1, 0.535622689326, 10.221919167898),
    ("dkd", {"T": 4, **WARM, "alpha": 1, "beta": 2}, "loss", 1, 0.353563045330, 3.005792292612),
    ("dist", {"T": 4}, "inter", 16, 5.049844918367, 11.384640055930),
    ("dist", {"T": 4}, "intra", 16, 0.000013425907, 11.351769630950),
    ("dist", {"T": 4, "beta": 2, "gamma": 2, "ce": 0}, "loss", 1, 10.099716688548, 45.472819373760),
    ("dist", {"T": 1, "beta": 1, "gamma": 1, "ce": 0}, "loss", 1, 0.506299244580, 1.480653112456),
    ("distill", {"T": 2, "lambda": 1, "standardize": True}, "loss", 1, 0.199665128826, 0.489242467545),
    ("distill", {"T": 2, "lambda": 0.9, "weight": 10, "standardize": True}, "loss", 1, 1.873498793828, 4.540501343382),
    ("dkd", {"T": 2, **WARM, "alpha": 9, "beta": 72, "standardize": True}, "loss", 1, 3.624390671614, 34.383099263967),
    ("nkd", {"T": 1, "gamma": 1.5, "ce": 0}, "loss", 1, 1.351154323991, 3.348704852105),
    ("nkd", {"T": 1, "gamma": 1.5, "ce": 0}, "target", 1, 0.547889310992, 0.997637019776),
    ("nkd", {"T": 4, "gamma": 1.5, "ce": 0}, "loss", 1, 16.841946408686, 28.585933203648),
    ("wsld", {"T": 2, "weight": 2.5, "ce": 0}, "loss", 1, 8.075120686743, 13.294177252605),
    ("wsld", {"T": 4, "weight": 2.25, "ce": 0}, "loss", 1, 32.767658132495, 49.177364945150),
    ("label_smoothing", {"smoothing": 0.1}, "loss", 1, 0.873459677266, 1.448191354807),
    ("tf_kd", {"alpha": 0.1, "T": 20}, "loss", 1, 0.761832862522, 1.308648750196),
]


@pytest.mark.parametrize(("name", "numbers", "part", "factor", "a", "b"), GOLDEN)
def test_numbers_from_other_code(
    name: str, numbers: dict[str, Any], part: str, factor: float, a: float, b: float
) -> None:
    loss = loss_of(name, **numbers)
    for case, expected in ((A, a), (B, b)):
        assert factor * loss(batch(*case))[part].item() == pytest.approx(expected, abs=1e-10, rel=0)


def test_label_smoothing_in_the_other_form() -> None:
    # 0.1 shared by the C − 1 other classes is 0.1·C/(C − 1) shared by all.
    for case, expected in ((A, 0.927626343933), (B, 1.473191354807)):
        classes = case[0].shape[1]
        loss = loss_of("label_smoothing", smoothing=0.1 * classes / (classes - 1))
        assert loss(batch(*case))["loss"].item() == pytest.approx(expected, abs=1e-10, rel=0)


@pytest.mark.parametrize(
    ("name", "numbers", "expected"),
    [
        (
            "distill",
            {"T": 4, "lambda": 1},
            [[-0.25682022, 0.119092, 0.13772822], [0.04623332, -0.01243405, -0.03379926]],
        ),
        ("dkd", {"T": 4, **WARM}, [[-0.25682022, -0.32447493, 0.58129515], [0.51447519, -0.48067593, -0.03379926]]),
        (
            "distill",
            {"T": 2, "lambda": 1, "standardize": True},
            [[-0.23304411, 0.07768139, 0.15536272], [0.00827151, -0.00620363, -0.00206788]],
        ),
    ],
)
def test_gradients_from_other_code(name: str, numbers: dict[str, Any], expected: list[list[float]]) -> None:
    torch.testing.assert_close(gradient(loss_of(name, **numbers), *A), logits(*expected), atol=6e-9, rtol=0)


def test_standardised_logits() -> None:
    expected = logits([-0.218217862, 1.091089308, -0.872871447], [-0.320256292, -0.800640731, 1.120897023])
    torch.testing.assert_close(standardized(A[0]), expected, atol=6e-10, rtol=0)


def test_the_cross_entropy_and_each_part_count_once() -> None:
    """`ce` is the cross-entropy of plain logits, and the loss is the weighted sum of the parts."""
    for case in (A, B):
        plain = cross_entropy(case[0], case[1]).item()
        sums = {
            "dkd": ({"T": 3, "warmup": 0, "ce": 0.7, "standardize": True}, {"ce": 0.7, "tckd": 9, "nckd": 72}),
            "dist": ({"T": 3, "beta": 5, "gamma": 6, "ce": 0.7}, {"ce": 0.7, "inter": 45, "intra": 54}),
            "nkd": ({"T": 3, "gamma": 5, "ce": 0.7}, {"ce": 0.7, "target": 1, "non_target": 45}),
            "wsld": ({"T": 3, "weight": 5, "ce": 0.7}, {"ce": 0.7, "soft": 45}),
            "label_smoothing": ({"smoothing": 0.3}, {"ce": 0.7, "uniform": 0.3}),
            "tf_kd": ({"alpha": 0.3}, {"ce": 0.7, "kl": 0.3}),
            "distill": ({"T": 3, "lambda": 0.3, "weight": 5, "standardize": True}, {"ce": 0.7, "kl": 13.5}),
        }
        for name, (numbers, factors) in sums.items():
            parts = loss_of(name, **numbers)(batch(*case))
            assert parts.keys() == {"loss", *factors}, name
            assert parts["ce"].item() == pytest.approx(plain), name
            assert parts["loss"].item() == pytest.approx(sum(f * parts[part].item() for part, f in factors.items())), (
                name
            )


# Identities

CASES = {
    "seed": st.integers(0, 10**6),
    "samples": st.integers(1, 6),
    "classes": st.integers(2, 12),
    "T": st.sampled_from([0.5, 1.0, 4.0, 20.0]),
}
cases = given(**CASES)
few = settings(max_examples=40, deadline=None)


@few
@cases
def test_kd_is_the_sum_of_its_decoupled_parts(seed: int, samples: int, classes: int, T: float) -> None:
    net, guide, labels = drawn(seed, samples, classes)
    known = 1 - (guide / T).softmax(1).gather(1, labels[:, None])[:, 0]
    each = [DKD(T=T)(batch(net[[i]], labels[[i]], guide[[i]])) for i in range(samples)]
    mean = sum(parts["tckd"] + known[i] * parts["nckd"] for i, parts in enumerate(each)) / samples
    kd = Distill(T=T, lam=1)(batch(net, labels, guide))["loss"]
    torch.testing.assert_close(kd, T**2 * torch.as_tensor(mean), rtol=1e-9, atol=1e-12)


@few
@given(name=st.sampled_from(LOGIT), **CASES)
def test_a_shift_of_logits_changes_nothing(name: str, seed: int, samples: int, classes: int, T: float) -> None:
    net, guide, labels = drawn(seed, samples, classes)
    shifts = torch.randn(2, samples, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    loss = loss_of(name, **({"T": T} if "T" in LOSSES[name].model_fields else {}))
    before = loss(batch(net, labels, guide))["loss"]
    after = loss(batch(net + 10 * shifts[0], labels, guide + 10 * shifts[1]))["loss"]
    torch.testing.assert_close(after, before, rtol=1e-8, atol=1e-9)
    # So a step along a row's shift has no slope.
    sums = gradient(loss, net, labels, guide).sum(1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-9)


@few
@cases
def test_equal_logits_are_at_a_minimum(seed: int, samples: int, classes: int, T: float) -> None:
    """Of KD, DKD and DIST, also standardised. NKD and WSLD are cross-entropies: their value is not 0."""
    guide, far, labels = drawn(seed, samples, classes)
    same = guide + 5
    numbers = {"T": T, "ce": 0, "warmup": 0}
    for loss in (
        Distill(T=T, lam=1),
        Distill(T=T, lam=1, standardize=True),
        loss_of("dkd", **numbers),
        loss_of("dkd", **numbers, standardize=True),
    ):
        assert loss(batch(same, labels, guide))["loss"].item() == pytest.approx(0, abs=1e-9)
        assert gradient(loss, same, labels, guide).abs().max() < 1e-6
        assert loss(batch(far, labels, guide))["loss"] > -1e-12
    parts = loss_of("dist", T=T)(batch(same, labels, guide))
    # The 1e-8 beside a product of two norms is felt if the probabilities hardly vary.
    spread = (guide / T).softmax(1).var(1, unbiased=False).min().item() * classes
    assert -1e-12 < parts["inter"].item() < 1.01e-8 / spread
    assert loss_of("nkd", T=T, ce=0)(batch(same, labels, guide))["loss"] > 0
    assert loss_of("wsld", T=T, ce=0)(batch(same, labels, guide))["loss"] > 0


def test_a_guide_pulls_by_the_same_strength_at_every_temperature() -> None:
    """T² compensates the two divisions by T: from T=50 to T=100 the gradient hardly changes."""
    net, guide, labels = drawn(5, 6, 4)
    guided = [("distill", {"lambda": 1}), ("dkd", WARM), ("nkd", {"ce": 0}), ("wsld", {"ce": 0})]
    for name, numbers in guided:
        high, higher = (gradient(loss_of(name, T=T, **numbers), net, labels, guide) for T in (50, 100))
        # NKD's target term has no T.
        assert 0.8 < (high.norm() / higher.norm()).item() < 1.25, name


@few
@cases
def test_standardising_forgets_shift_and_scale(seed: int, samples: int, classes: int, T: float) -> None:
    net, guide, labels = drawn(seed, samples, classes)
    scales = 0.5 + torch.rand(2, samples, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(standardized(net * scales[0] + 3), standardized(net), rtol=1e-5, atol=1e-5)
    for loss in (Distill(T=T, lam=1, standardize=True), loss_of("dkd", T=T, ce=0, standardize=True)):
        before = loss(batch(net, labels, guide))["loss"]
        after = loss(batch(net * scales[0] + 3, labels, guide * scales[1] - 7))["loss"]
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
        # The gradient flows through the deviation, so a longer row has no slope either.
        assert (gradient(loss, net, labels, guide) * net).sum(1).abs().max() < 1e-4


def test_standardised_logits_have_a_deviation_of_one() -> None:
    rows = standardized(drawn(6, 5, 7)[0])
    torch.testing.assert_close(rows.mean(1), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(rows.square().sum(1) / 6, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", [Distill(T=2, lam=0.9, weight=10, standardize=True), DIST(T=4)])
def test_a_classifier_that_begins_at_zero_learns(loss: Formula) -> None:
    """Equal logits have no deviation to divide by."""
    noise, guide, _ = drawn(3, 60, 5)
    rows, labels = torch.cat([noise, guide], 1) / 3, guide.argmax(1)
    weight = torch.zeros(10, 5, dtype=torch.float64)
    for step in range(60):
        slope = gradient(loss, rows @ weight, labels, guide)
        assert step or slope.norm() < 1000  # and not a million
        weight -= 0.05 * rows.T @ slope
    assert ((rows @ weight).argmax(1) == labels).float().mean() > 0.9


def test_deviations_and_norms_of_usual_size_keep_every_bit() -> None:
    net, guide, _ = drawn(4, 6, 5)
    net = net.requires_grad_()
    (q, p), sums = ((each / 4).softmax(1) for each in (net, guide)), []
    for dim in (0, 1):
        a, b = q - q.mean(dim, keepdim=True), p - p.mean(dim, keepdim=True)
        usual = (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + 1e-8)
        sums.append([usual, correlation(q, p, dim)])
    rows = (net - net.mean(1, keepdim=True)) / (net.std(1, keepdim=True) + 1e-7)
    sums.append([rows.pow(3), standardized(net).pow(3)])
    for usual, found in sums:
        assert torch.equal(usual, found)
        assert torch.equal(*(torch.autograd.grad(each.sum(), net, retain_graph=True)[0] for each in (usual, found)))


def test_dkd_grows_to_its_weight() -> None:
    net, labels, guide = A
    full = DKD(T=4, warmup=0)(batch(net, labels, guide))
    ce = full["ce"].item()
    growth = full["loss"].item() - ce
    for epoch, share in ((0, 0.05), (1, 0.1), (18, 0.95), (19, 1), (20, 1), (300, 1)):
        found = DKD(T=4)(batch(net, labels, guide, epoch))
        assert found["loss"].item() == pytest.approx(ce + share * growth)
        assert found["nckd"].item() == pytest.approx(full["nckd"].item())  # parts are without weights
    assert DKD(T=4, warmup=2)(batch(net, labels, guide))["loss"].item() == pytest.approx(ce + growth / 2)


def test_two_classes_leave_nothing_among_the_others() -> None:
    net, guide, labels = drawn(7, 5, 2)
    dkd = DKD(T=3, alpha=1, beta=8, ce=0, warmup=0)
    assert dkd(batch(net, labels, guide))["nckd"].item() == 0
    kd = Distill(T=3, lam=1)
    torch.testing.assert_close(dkd(batch(net, labels, guide))["loss"], kd(batch(net, labels, guide))["loss"])
    torch.testing.assert_close(gradient(dkd, net, labels, guide), gradient(kd, net, labels, guide))
    assert NKD(T=3)(batch(net, labels, guide))["non_target"].item() == 0


def test_a_batch_of_one_has_no_correlation_over_samples() -> None:
    net, guide, labels = drawn(8, 1, 4)
    parts = loss_of("dist")(batch(net, labels, guide))
    assert parts["intra"].item() == 1
    over_samples = gradient(loss_of("dist", beta=0, ce=0), net, labels, guide)
    assert over_samples.abs().max() == 0


def test_only_dist_depends_on_which_samples_share_a_batch() -> None:
    net, guide, labels = drawn(9, 6, 4)
    for name in LOGIT:
        loss, halves = loss_of(name), (slice(0, 3), slice(3, 6))
        whole = loss(batch(net, labels, guide))["loss"].item()
        mean = sum(loss(batch(net[h], labels[h], guide[h]))["loss"].item() for h in halves) / 2
        assert (whole == pytest.approx(mean)) == (name != "dist"), name


def test_wsld_counts_a_sample_less_that_the_net_knows_better() -> None:
    guide, labels = logits([1, 0, 0]), torch.tensor([0])
    known, unknown = logits([5, 0, 0]), logits([-5, 0, 0])
    # w = 1 − exp(−CE(net)/CE(guide)), worked out from the parts.
    for net in (known, unknown):
        ratio = cross_entropy(net, labels).item() / cross_entropy(guide, labels).item()
        soft = -((guide / 2).softmax(1) * (net / 2).log_softmax(1)).sum().item()
        found = WSLD(T=2)(batch(net, labels, guide))["soft"].item()
        assert found == pytest.approx((1 - exp(-ratio)) * soft, rel=1e-5)


def test_wsld_has_no_gradient_through_its_weights() -> None:
    net, guide, labels = drawn(10, 6, 4)
    w = (
        1
        - (
            -cross_entropy(net, labels, reduction="none") / (cross_entropy(guide, labels, reduction="none") + 1e-7)
        ).exp()
    )
    expected = 2 * 3 * w[:, None] * ((net / 3).softmax(1) - (guide / 3).softmax(1)) / 6
    torch.testing.assert_close(gradient(WSLD(T=3, weight=2, ce=0), net, labels, guide), expected)


def test_label_smoothing_is_torchs() -> None:
    net, _, labels = drawn(11, 6, 9)
    for smoothing in (0.0, 0.1, 0.6):
        found = loss_of("label_smoothing", smoothing=smoothing)(batch(net, labels))["loss"]
        torch.testing.assert_close(found, cross_entropy(net, labels, label_smoothing=smoothing))


# Extreme logits


@pytest.mark.parametrize("name", LOGIT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(name: str, dtype: torch.dtype) -> None:
    """Value and gradient, in fp32, as kd/training/step.py converts what networks compute in bf16."""
    temperatures = [1e-3, 1.0, 100.0] if "T" in LOSSES[name].model_fields else [None]
    flags = [{"standardize": flag} for flag in (False, True) if "standardize" in LOSSES[name].model_fields]
    for size in (60.0, 1e4):
        row = torch.tensor([size, -size, 0.0, size / 3])
        rows = torch.stack([row, row, -row, row.roll(1), torch.zeros(4), torch.full((4,), size)]).to(dtype).float()
        pairs = [(rows, rows), (rows, -rows), (rows, rows.roll(1, 1)), (rows, rows.roll(1, 0)), (0 * rows, rows)]
        pairs += [(guide, net) for net, guide in pairs]
        for net, guide in [*pairs, *((net[:1], guide[:1]) for net, guide in pairs), *_two_classes(pairs)]:
            for labels in (torch.zeros(len(net), dtype=torch.int64), torch.ones(len(net), dtype=torch.int64)):
                for T in temperatures:
                    for numbers in flags or [{}]:
                        loss = loss_of(name, **({} if T is None else {"T": T}), **numbers)
                        logit = net.clone().requires_grad_()
                        parts = loss(batch(logit, labels, guide, epoch=30))
                        parts["loss"].backward()  # type: ignore[no-untyped-call]
                        assert parts["loss"].dtype == torch.float32
                        assert all(torch.isfinite(part) for part in parts.values()), (T, net, guide, parts)
                        assert logit.grad is not None
                        assert torch.isfinite(logit.grad).all(), (T, net, guide, logit.grad)


def _two_classes(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(net[:, :2], guide[:, :2]) for net, guide in pairs]


@pytest.mark.parametrize("name", LOGIT)
def test_confident_logits_keep_their_value(name: str) -> None:
    """In fp32 the loss is that of float64, also where the probability of the label or of the others rounds to 0."""
    net, guide, labels = drawn(12, 6, 5)
    for scale in (1, 30, 1000):
        exact = loss_of(name)(batch(scale * net, labels, -scale * guide, epoch=30))["loss"]
        found = loss_of(name)(batch((scale * net).float(), labels, (-scale * guide).float(), epoch=30))["loss"]
        assert found.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("weight", [0.005, -0.04])  # trained, nasty
@pytest.mark.parametrize(("size", "T"), [(60, 1), (240, 4), (2000, 20)])
def test_where_the_originals_teacher_loss_is_nan_ours_is_finite(weight: float, size: float, T: float) -> None:
    """docs/migration.md: probabilities are the target of their `kl_div`, whose slope at 0 is infinite."""
    row = torch.tensor([size, -size, 0.0])
    net, guide, labels = torch.stack([row, row.roll(1)]), torch.stack([-row, row]), torch.tensor([0, 1])
    logit = net.clone().requires_grad_()
    theirs = kl_div((guide / T).log_softmax(1), (logit / T).softmax(1), reduction="batchmean")
    (cross_entropy(logit, labels) + weight * T**2 * theirs).backward()  # type: ignore[no-untyped-call]
    assert logit.grad is not None
    assert logit.grad.isnan().any()
    loss = TeachableTeacher(T=T, weight=weight)
    exact = gradient(loss, net.double(), labels, guide.double())
    torch.testing.assert_close(gradient(loss, net, labels, guide).double(), exact, rtol=1e-5, atol=1e-9)


def test_t_squared_stays_without_labels() -> None:
    """docs/migration.md: at alpha 0 torchdistill's loss is the KL alone, which is ours at λ 1 divided by T²."""
    net, guide, labels = drawn(16, 6, 4)
    for T in (1, 4, 20):
        theirs = kl_div((net / T).log_softmax(1), (guide / T).softmax(1), reduction="batchmean")
        ours = Distill(T=T, lam=1)(batch(net, labels, guide))["loss"]
        torch.testing.assert_close(ours, T**2 * theirs)


WITH_T = [name for name in LOGIT if "T" in LOSSES[name].model_fields]


@pytest.mark.parametrize("name", WITH_T)
@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("apart", [1, 0.1])
def test_fp32_is_right_at_the_highest_temperature(name: str, classes: int, apart: float) -> None:
    """Of the guide's term alone, also for a net that is close to its guide, where the KL is small."""
    net, guide, labels = drawn(14, 128, classes)
    net, guide = (each.float().double() for each in (guide + apart * (net - guide), guide))
    alone = {"lambda": 1, "weight": 1, "ce": 0, "warmup": 0, "alpha": 1}
    loss = loss_of(name, T=100, **{key: value for key, value in alone.items() if key in fields_of(name)})
    exact, found = (loss(batch(each, labels, guide.to(each.dtype))) for each in (net, net.float()))
    free = {"teachable_teacher": "ce"}.get(name)  # its CE has no weight
    values = [parts["loss"].item() - (parts[free].item() if free else 0) for parts in (exact, found)]
    assert values[1] == pytest.approx(values[0], rel=0.01)
    slope, right = (gradient(loss, each, labels, guide.to(each.dtype)).double() for each in (net.float(), net))
    assert (slope - right).norm() <= 0.01 * right.norm()


def fields_of(name: str) -> set[str]:
    return {field.serialization_alias or key for key, field in LOSSES[name].model_fields.items()}


@pytest.mark.parametrize("name", [name for name in WITH_T if name != "tf_kd"])
@pytest.mark.parametrize("T", [0, -1, 100.5, 1e4, 1e5, 1e300])
def test_a_temperature_that_fp32_cannot_compute_is_refused(name: str, T: float) -> None:
    with pytest.raises(ValidationError, match="should be at most 100" if T > 0 else "greater than 0"):
        loss_of(name, T=T)


@pytest.mark.parametrize("key", ["method.T", "method.assistant.T", "method.teacher.T"])
def test_the_line_names_the_key_of_the_temperature(key: str) -> None:
    method = "trained_teacher" if "teacher" in key else "ta"
    with pytest.raises(KnownError, match=rf"^{key}: should be at most 100: .* \(got 10000\.0\)$"):
        parse(composed(f"method={method}", f"{key}=1e4"))
    assert parse(composed(f"method={method}", f"{key}=100"))


def test_the_virtual_teachers_temperature_has_no_limit() -> None:
    """It is no divisor of the net's logits, so nothing cancels."""
    net, _, labels = drawn(15, 64, 100)
    for T in (1e2, 1e4, 1e6):
        exact, found = (loss_of("tf_kd", T=T, alpha=1)(batch(each, labels))["loss"] for each in (net, net.float()))
        assert found.item() == pytest.approx(exact.item(), rel=1e-5)


# The table


def test_the_losses_are_there() -> None:
    assert {"cross_entropy", "distill", "teachable_teacher", *OURS} <= set(LOGIT)
    assert {"label_smoothing", "tf_kd", "cross_entropy"} == set(LOGIT) - set(GUIDED)


@pytest.mark.parametrize("name", LOGIT)
def test_every_loss_keeps_to_the_table(name: str) -> None:
    """It can be read from its record, it is a scalar with a gradient, and the order of the images does not matter.

    A loss without a guide reads none, and no gradient flows to the guide's side of a loss that needs one.
    """
    assert LOSSES[name].model_fields["name"].default == name
    loss = loss_of(name)
    assert LOSSES.parse(loss.dump()) == loss
    net, guide, labels = drawn(13, 6, 4)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    parts = loss(batch(net, labels, guide if loss.guided else None))
    other = loss(batch(net[order], labels[order], guide[order] if loss.guided else None))
    assert all(part.shape == () and torch.isfinite(part) for part in parts.values())
    torch.testing.assert_close(parts["loss"], other["loss"])
    assert gradient(loss, net, labels, guide if loss.guided else None).abs().sum() > 0
    if loss.guided:
        with pytest.raises(LookupError, match="no logits here"):
            loss(batch(net, labels))
        assert loss(batch(net, labels, drawn(14, 6, 4)[1]))["loss"] != parts["loss"]


@pytest.mark.parametrize("name", sorted({*LOGIT} - {"wsld"}))
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """But for WSLD, whose weights are constants in the gradient."""
    net, guide, labels = drawn(14, 4, 5)
    inputs = (net.requires_grad_(),)
    assert torch.autograd.gradcheck(lambda z: loss_of(name)(batch(z, labels, guide, epoch=3))["loss"], inputs)


def test_different_losses_have_different_labels() -> None:
    """The names of runs and the rows of tables differ, whichever number is changed."""
    losses = {name: [loss_of(name)] for name in LOGIT}
    for name, variants in losses.items():
        for key, field in LOSSES[name].model_fields.items():
            value = getattr(variants[0], key)
            if key in ("name", "reduction"):  # the reduction is the mode's, which the run's page has
                continue
            changed = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 0.75
            variants.append(loss_of(name, **{field.serialization_alias or key: changed}))
    every = [loss for variants in losses.values() for loss in variants]
    assert len({loss.described for loss in every}) == len({loss.shown for loss in every}) == len(every)
    # A trained teacher's T is not in its label: w0.005.
    assert len({loss.label for loss in every if loss.name != "teachable_teacher"}) == len(every) - 3
    assert all(loss.label.startswith(loss.name) for loss in every if loss.name in OURS)
    assert max(len(loss.label) for loss in every) < 40


@pytest.mark.parametrize(
    ("loss", "label"),
    [
        (CrossEntropy(), ""),
        (Distill(T=4, lam=0.5), "T4 λ0.5"),
        (TeachableTeacher(T=4, weight=0.005), "w0.005"),
        (DKD(T=4), "dkd T4 β8"),
        (DKD(T=2, alpha=9, beta=72, warmup=0, ce=0.1, standardize=True), "dkd T2 β72 α9 warmup0 ce0.1 z"),
        (NKD(T=1), "nkd T1 gamma1.5 ce1"),
    ],
)
def test_labels(loss: Formula, label: str) -> None:
    assert loss.label == label


@pytest.mark.parametrize("option", ["kd", *OURS])
def test_a_configuration_has_the_defaults_of_its_loss(option: str) -> None:
    """conf/loss/<option>.yaml has every number that the method does not set, at the spec's default."""
    tree: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "loss" / f"{option}.yaml"))
    choice = LossChoice.model_validate(tree)
    shared = {"T": 4.0, "lambda": 0.5, "reduction": "batchmean"}
    assert choice.name == ("distill" if option == "kd" else option)
    assert choice.spec(**shared) == loss_of(choice.name)
    names = {field.serialization_alias or key for key, field in choice.kind.model_fields.items()}
    assert set(choice.fields) == {name for name in names if name != "name" and not choice.reads(name)}
    assert choice.reads("T") == (option not in ("label_smoothing", "tf_kd"))


def test_an_unknown_loss_is_no_traceback() -> None:
    with pytest.raises(ValueError, match="there are cross_entropy"):
        LOSSES.parse({"name": "gone"})


@pytest.mark.parametrize("bad", [{"T": 0, "lam": 0.5}, {"T": 1, "lam": 1.1}, {"T": float("nan"), "lam": 0}, {"T": 1}])
def test_ranges(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Distill(**bad)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *((name, {"T": 0}) for name in ("dkd", "dist", "nkd", "wsld", "tf_kd")),
        *((name, {"ce": -1}) for name in ("dkd", "dist", "nkd", "wsld")),
        ("dkd", {"alpha": -1}),
        ("dkd", {"beta": -1}),
        ("dkd", {"warmup": -1}),
        ("dkd", {"warmup": 0.5}),
        ("dist", {"beta": -1}),
        ("dist", {"gamma": -1}),
        ("nkd", {"gamma": -1}),
        ("wsld", {"weight": 0}),
        ("label_smoothing", {"smoothing": 1}),
        ("label_smoothing", {"smoothing": -0.1}),
        ("tf_kd", {"alpha": 1.1}),
        ("tf_kd", {"correct": 1}),
        ("distill", {"weight": 0}),
    ],
)
def test_ranges_of_the_other_losses(name: str, bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        loss_of(name, **bad)
