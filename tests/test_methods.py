"""Each method's chain, and the stages that methods share."""

from pathlib import Path

import pytest

from kd.app.config import plan
from kd.app.parsing import parse
from kd.core.spec import KnownError
from kd.core.stage import Stage
from kd.datasets import resolve
from kd.losses import Distill, TeachableTeacher
from kd.methods import METHODS
from kd.methods.multi_teacher import MultiTeacher
from tests.conftest import composed


class Committee(MultiTeacher):
    """A method of another package that is built on one of ours."""


def planned(*overrides: str) -> Stage:
    config = parse(composed(*overrides))
    return plan(config, resolve(config.dataset, config.data_root))[0]


def shape(stage: Stage) -> list[tuple[str, str, str, int]]:
    return [(s.role, s.model, s.loss.name, s.seed) for s in stage.chain]


def test_scratch_ignores_the_teacher() -> None:
    student = planned("method=scratch", "seed=3")
    assert shape(student) == [("student", "resnet8", "cross_entropy", 3)]
    assert student.key == planned("method=scratch", "seed=3", "teacher=resnet110").key


def test_kd() -> None:
    student = planned("method=kd", "teacher=resnet110", "method.T=5", "method.lambda=0.2", "seed=7")
    assert shape(student) == [("teacher", "resnet110", "cross_entropy", 0), ("student", "resnet8", "distill", 7)]
    assert student.loss == Distill(T=5, lam=0.2)


def test_ta_of_any_length() -> None:
    student = planned(
        "method=ta", "method.assistants=[resnet56,plane6]", "method.assistant.seed=2", "method.assistant.T=3"
    )
    assert shape(student) == [
        ("teacher", "resnet20", "cross_entropy", 0),
        ("assistant", "resnet56", "distill", 2),
        ("assistant", "plane6", "distill", 2),
        ("student", "resnet8", "distill", 0),
    ]
    assert [s.loss.T for s in student.chain if isinstance(s.loss, Distill)] == [3, 3, 4]


@pytest.mark.parametrize("assistants", [["resnet14", "resnet14"], ["resnet26", "resnet14", "resnet26"]])
def test_an_assistant_may_come_twice(assistants: list[str]) -> None:
    student = planned("method=ta", f"method.assistants=[{','.join(assistants)}]")
    assert [model for _, model, _, _ in shape(student)] == ["resnet20", *assistants, "resnet8"]
    assert len({stage.key for stage in student.chain}) == len(assistants) + 2


def test_trained_teacher_and_its_nasty_sign() -> None:
    student = planned(
        "method=trained_teacher", "method.assistants=[resnet14]", "method.teacher.weight=-0.04", "teacher.seed=1"
    )
    assert shape(student) == [
        ("reference", "resnet8", "cross_entropy", 1),
        ("teacher", "resnet20", "teachable_teacher", 1),
        ("assistant", "resnet14", "distill", 0),
        ("student", "resnet8", "distill", 0),
    ]
    assert student.chain[1].loss == TeachableTeacher(T=4, weight=-0.04)
    assert planned("method=trained_teacher", "method.reference=plane2").chain[0].model == "plane2"


def test_the_reference_is_the_scratch_student() -> None:
    assert planned("method=trained_teacher").chain[0].key == planned("method=scratch").key
    assert planned("method=trained_teacher", "teacher.seed=1").chain[0].key != planned("method=scratch").key


def test_sweeping_the_student_leaves_everything_above_it_alone() -> None:
    one = planned("method=ta")
    other = planned("method=ta", "method.T=9", "method.lambda=0.1", "seed=5", "model.train.lr=0.02")
    assert [s.key for s in one.chain[:-1]] == [s.key for s in other.chain[:-1]]
    assert one.key != other.key


def test_kd_and_ta_share_the_teacher() -> None:
    assert planned("method=kd").chain[0].key == planned("method=ta").chain[0].key


def test_each_network_has_its_own_familys_recipe() -> None:
    chain = planned(
        "method=ta", "model=plane2", "teacher=resnet20", "method.assistants=[plane4]", "dataset=cifar10"
    ).chain
    assert [(s.model, s.train.lr, s.train.schedule, s.train.epochs) for s in chain] == [
        ("resnet20", 0.1, "step", 160),
        ("plane4", 0.01, "constant", 160),
        ("plane2", 0.01, "constant", 160),
    ]


def test_overrides_reach_the_chain_the_teacher_or_the_student() -> None:
    chain = planned("method=ta", "train.epochs=9", "teacher.train.lr=0.3", "model.train.lr=0.2").chain
    assert [(s.train.epochs, s.train.lr) for s in chain] == [(9, 0.3), (9, 0.05), (9, 0.2)]


@pytest.mark.parametrize("method", METHODS)
def test_every_student_is_last_and_ours(method: str) -> None:
    student = planned(f"method={method}", "model=plane4")
    assert (student.role, student.model) == ("student", "plane4")


def test_students_of_the_papers_methods_are_distilled_but_for_scratch() -> None:
    losses = {name: planned(f"method={name}").loss.name for name in ("scratch", "kd", "ta", "trained_teacher")}
    assert losses == {"scratch": "cross_entropy", "kd": "distill", "ta": "distill", "trained_teacher": "distill"}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("method=trained_teacher",), "method=trained_teacher trains its own teacher; use method=kd with a checkpoint"),
        (
            ("method=multi_teacher", "method.name=tests.test_methods.Committee", "method.teachers=[resnet14,resnet26]"),
            "teacher=resnet20 should be one of method.teachers (got [resnet14,resnet26])",
        ),
    ],
)
def test_a_method_says_why_it_takes_no_checkpoint(overrides: tuple[str, ...], line: str, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    with pytest.raises(KnownError) as refused:
        parse(composed(f"teacher.checkpoint={tmp_path / 'weights.pt'}", *overrides))
    assert str(refused.value) == f"teacher.checkpoint: {line}"
