"""The papers' tables: what was published, how cells expand, and the graph that they share."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kd.app.experiments import experiments, read_yaml
from kd.core.spec import KnownError
from kd.losses import LOSSES
from kd.losses.dkd import DKD
from kd.tools.paper.graph import Graph, graph
from kd.tools.paper.request import Copy, Request, profiles
from kd.tools.paper.tables import Row, Table, papers, parse_paper
from kd.tools.paper.trainer import stage_line
from tests.test_datasets import write_folder
from tests.test_methods import planned as run_planned
from tests.test_photos import snapshots

ROWS: dict[tuple[str, str], Row] = {
    (table.id, row.id): row for paper in papers() for table in paper.tables for row in table.expanded
}
SECOND_HAND, AUTHOR = "quoted at second hand", "by the author in an issue"
PLAIN = {"NOKD": (70.16, SECOND_HAND), "BLKD": (72.57, SECOND_HAND), "TAKD": (73.51, SECOND_HAND)}
ROUNDED, CLAIM = "by the author in an issue, rounded", "claimed, in no table that could be verified"


def planned(*tables: str, rows: tuple[str, ...] = (), profile: str = "full", **more: Any) -> Graph:
    return graph(Request(profile, profiles()[profile], tables, rows, **{"seeds": (0,), **more}))


def recalled(values: dict[str, float] | None = None, **more: float) -> dict[str, tuple[float, str]]:
    status = "recalled from the paper, not read again"
    return {label: (value, status) for label, value in ((values or {}) | more).items()}


def test_a_number_of_a_pair_that_is_not_there() -> None:
    reported = {"source": "x", "status": "verified", "rows": {"resnet18_net": {"alone": 86.6}, "resnet18_nett": {}}}
    known = {**reported, "rows": {"resnet18_net": {"alone": 86.6}}}
    for sources, problem in [
        ([reported], "reported: there is no row resnet18_nett"),
        ([known, known], "reported: two sources have a number of the same cell of resnet18_net"),
    ]:
        rows = [{"every": "pair", "group": "tt", "reported": sources}]
        with pytest.raises(ValidationError, match=problem):
            Table.model_validate({"id": "one", "title": "one", "dataset": "cifar10", "rows": rows})


def test_published_numbers_are_what_is_known() -> None:
    """Each published number with its status. Others are printed as n/a."""
    of_the_paper = {
        ("takd_cifar10", "plane"): PLAIN,
        ("searched_cifar10", "plane"): PLAIN,
        ("takd_cifar100", "plane"): {"NOKD": (41.09, SECOND_HAND), "BLKD": (44.57, SECOND_HAND)}
        | {"TAKD": (44.92, SECOND_HAND)},
        ("takd_cifar100", "resnet"): {"NOKD": (61.37, AUTHOR), "BLKD": (61.41, AUTHOR), "TAKD": (61.82, AUTHOR)},
        ("takd_cifar10", "resnet"): recalled(NOKD=88.52, BLKD=88.65, TAKD=88.98),
        ("size_cifar10", "plane"): recalled({"10→8→2": 72.75, "10→6→2": 73.15})
        | {"10→2": PLAIN["BLKD"], "10→4→2": PLAIN["TAKD"]},
        ("size_cifar100", "plane"): recalled({"10→8→2": 44.28, "10→6→2": 44.57})
        | {"10→2": (44.57, SECOND_HAND), "10→4→2": (44.92, SECOND_HAND)},
        ("size_cifar10", "resnet"): recalled(
            {"110→8": 88.65, "110→56→8": 88.70, "110→32→8": 88.73, "110→20→8": 88.90, "110→14→8": 88.98}
        ),
        ("size_cifar100", "resnet"): recalled({"110→56→8": 61.47, "110→32→8": 61.55, "110→14→8": 61.50})
        | {"110→8": (61.41, AUTHOR), "110→20→8": (61.82, AUTHOR)},
        ("tt_cifar10", "resnet18_net"): recalled(alone=86.64, normal=87.75, nasty=82.46),
        ("tt_cifar10", "resnet18_preresnet20"): recalled(alone=92.28, normal=92.49, nasty=88.01),
        ("tt_cifar10", "resnet18_preresnet32"): recalled(alone=93.04, normal=93.31, nasty=89.69),
        ("tt_cifar10", "resnet50_net"): recalled(alone=86.64),
        ("tt_cifar10", "resnet50_preresnet20"): recalled(alone=92.28),
        ("tt_cifar10", "resnet50_preresnet32"): recalled(alone=93.04),
        ("tt_cifar100", "resnet18_mobilenetv2"): recalled(alone=69.12, normal=73.11, nasty=3.45),
        ("tt_cifar100", "resnet18_shufflenetv2"): recalled(alone=71.17, normal=74.24, nasty=64.49),
        ("tt_cifar100", "resnet50_mobilenetv2"): recalled(alone=69.12, normal=72.81, nasty=3.36),
        ("tt_cifar100", "resnet50_shufflenetv2"): recalled(alone=71.17, normal=74.00, nasty=63.16),
        ("tt_cifar100", "resnext29_mobilenetv2"): recalled(alone=69.12, normal=72.43, nasty=1.55),
        ("tt_cifar100", "resnext29_shufflenetv2"): recalled(alone=71.17, normal=74.50, nasty=58.99),
        ("tt_cifar100", "resnet50_resnet18"): {**recalled(normal=79.65, nasty=71.94), "alone": (77.44, AUTHOR)},
        ("tt_cifar100", "resnext29_resnet18"): {**recalled(normal=80.84, nasty=68.52), "alone": (77.44, AUTHOR)},
        ("takd_imagenet", "resnet"): {"NOKD": (65.20, SECOND_HAND), "BLKD": (66.60, SECOND_HAND)}
        | {"TAKD": (67.36, SECOND_HAND)},
        ("takd_cifar10", "above"): {"resnet110": (93, ROUNDED), "resnet20": (91.5, ROUNDED), "110→20": (92.82, AUTHOR)},
        ("takd_cifar100", "above"): {"resnet110": (72.38, AUTHOR), "resnet20": (67.03, AUTHOR)}
        | {"110→20": (68.11, AUTHOR)},
    }
    for place, row in ROWS.items():
        if place[0] == "benchmark":
            continue
        known = {label: (p.value, p.status) for label, p in row.published.items() if not p.difference}
        assert known == of_the_paper.get(place, {}), place
        claimed = {label: (p.value, p.status) for label, p in row.published.items() if p.difference}
        trained = any(cell.label == "trained" for cell in row.expanded) and place[0].startswith("tt_")
        assert claimed == ({"trained": (2, CLAIM)} if trained else {}), place


def test_the_benchmarks_numbers_and_who_reported_which_epoch() -> None:
    """A number of each source, of a pair at the ends and in the middle of its list."""
    rows = {row: found for (table, row), found in ROWS.items() if table == "benchmark"}
    last, best = "last epoch", "epoch not stated, probably the best on the test set"
    logs = "epoch not stated, by its logs near the "
    for row, label, value, status in [
        ("resnet56_resnet20", "alone", 69.06, last),
        ("resnet32x4_resnet8x4", "FitNet", 73.50, last),
        ("vgg13_mobilenetv2_half", "AT", 59.40, last),
        ("resnet50_vgg8", "PKT", 73.01, last),
        ("wrn_40_2_shufflenetv1", "CRD", 76.05, last),
        ("resnet32x4_resnet8x4", "DKD", 76.32, best),
        ("resnet32x4_shufflenetv2_rd", "DKD", 77.07, best),
        ("resnet110_resnet20", "DKD", 71.06, "epoch not stated"),
        ("wrn_40_2_wrn_16_2", "KD standardized", 76.11, logs + "last"),
        ("vgg13_vgg8", "DKD standardized", 74.81, logs + "best on the test set"),
        ("wrn_40_2_wrn_40_1", "DIST", 74.43, "epoch not stated"),
    ]:
        published = rows[row].published[label]
        assert (published.value, published.status) == (value, status), (row, label)
    ours = {label for row in rows.values() for label in {cell.label for cell in row.expanded} - row.published.keys()}
    assert {"NKD", "WSLD", "OFD", "ReviewKD", "SimKD", "Tf-KD", "label smoothing"} < ours
    assert sum(len(row.published) for row in rows.values()) == 9 * 13 + 11 + 1 + 10 + 10 + 6


@pytest.mark.slow
def test_the_benchmark_has_every_pair_and_every_loss() -> None:
    """Two rows are planned. All rows have the same cells."""
    rows = [row for (table, _), row in ROWS.items() if table == "benchmark"]
    assert len(rows) == 13
    assert len({tuple(cell.label for cell in row.expanded) for row in rows}) == 1
    found = planned("benchmark", rows=("resnet56_resnet20", "vgg13_mobilenetv2_half"))
    (table,) = found.tables
    students = [[job.student for cell in row.cells for job in cell.jobs.values()] for row in table.rows]
    for stages in students:
        assert {stage.loss.name for stage in stages} == {*LOSSES} - {"teachable_teacher"}
        assert len({stage.key for stage in stages}) == len(stages)  # no two cells are the same
    for stage, _ in found.stages.values():
        mobile = stage.model.startswith(("mobile", "shuffle"))
        assert (stage.dataset.name, stage.train.epochs, stage.train.batch_size) == ("cifar100", 240, 64)
        assert stage.train.lr == (0.01 if mobile else 0.05)
    betas = [[stage.loss.beta for stage in stages if isinstance(stage.loss, DKD)] for stages in students]
    assert betas == [[2, 36], [6, 18]]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("method=kd",), "student plane2 from plane10, seed 0 (KEY)"),
        (("method=scratch",), "student plane2, seed 0 (KEY)"),
        (("method=kd", "loss=dkd"), "student plane2 by dkd from plane10, seed 0 (KEY)"),
        (("method=scratch", "loss=tf_kd"), "student plane2 by tf_kd, seed 0 (KEY)"),
        (
            ("method=dgkd", "method.assistants=[plane4]", "loss=rkd"),
            "student plane2 by rkd from plane10 + plane4, seed 0 (KEY)",
        ),
    ],
)
def test_a_line_about_a_stage_names_guides_and_a_loss_that_is_not_usual(overrides: tuple[str, ...], line: str) -> None:
    student = run_planned("model=plane2", "teacher=plane10", *overrides)
    assert stage_line(student).replace(student.key, "KEY") == line


def test_tables_that_run_by_name_only() -> None:
    named = {table.table.id for table in planned("benchmark", rows=("resnet56_resnet20",)).tables}
    assert named == {"benchmark"}
    everything = Request("full", profiles()["full"], seeds=(0,)).chosen()
    assert not {"benchmark", "teachers_cifar10", "losses_cifar10"} & {table.id for _, table, _ in everything}


def test_trained_teachers_pairs() -> None:
    """The pairs of the released experiments, each with all its teachers."""
    small, large = ("mobilenetv2", "shufflenetv2"), ("resnet18", "mobilenetv2", "shufflenetv2")
    cnns = ("net", "preresnet20", "preresnet32")
    assert {row for table, row in ROWS if table == "tt_cifar10"} == {
        f"{teacher}_{student}" for teacher in ("resnet18", "resnet50") for student in cnns
    }
    pairs = {f"resnet18_{s}" for s in small} | {f"{t}_{s}" for t in ("resnet50", "resnext29") for s in large}
    for table in ("tt_cifar100", "tt_tiny_imagenet"):
        assert {row for name, row in ROWS if name == table} == pairs
    for (table, name), row in ROWS.items():
        if table.startswith("tt_"):
            assert row.baseline == "normal"
            labels = {cell.overrides[0].split("/")[-1].split("_")[0]: cell.label for cell in row.expanded}
            assert labels == {"baseline": "alone"} | {kind: kind for kind in labels if kind != "baseline"}, name


def test_cells_that_name_an_experiment_name_one_on_the_tables_data() -> None:
    """TAKD's first two tables, except three numbers on CIFAR-100, and all of Trained Teacher's."""
    named = {
        (table, override.removeprefix("experiment="))
        for (table, _), row in ROWS.items()
        for cell in row.expanded
        for override in cell.overrides
        if override.startswith("experiment=")
    }
    of_takd = {"takd_cifar10": 9, "takd_cifar100": 6, "takd_imagenet": 3}
    of_tt = {"tt_cifar10": 18, "tt_cifar100": 24}
    assert Counter(table for table, _ in named) == {**of_takd, **of_tt, "tt_tiny_imagenet": 24}
    for table, experiment in named:
        assert table.partition("_")[2] == experiments()[experiment].dataset


def test_paths_are_all_subsets() -> None:
    plane = [cell.label for cell in ROWS["paths_cifar10", "plane"].expanded]
    assert set(plane) == {"10→2", "10→8→2", "10→6→2", "10→4→2", "10→8→6→2", "10→8→4→2", "10→6→4→2", "10→8→6→4→2"}
    resnet = [cell.label for cell in ROWS["paths_cifar100", "resnet"].expanded]
    assert len(set(resnet)) == 2**6
    assert "110→56→44→32→26→20→14→8" in resnet
    sizes = [cell.label for cell in ROWS["size_cifar10", "plane"].expanded]
    assert sizes == ["10→2", "10→8→2", "10→6→2", "10→4→2"]


def test_paths_share_their_beginnings() -> None:
    """8 paths have 3·4 assistants in them, of which 7 differ: 16 stages, not 28; TAKD's own row adds the student."""
    stages = planned("paths_cifar10", rows=("plane",)).stages
    assert len(stages) == 1 + 7 + 8
    assert len(planned("paths_cifar10", "takd_cifar10", "size_cifar10", rows=("plane",)).stages) == 1 + 7 + 8 + 1
    order = list(stages)
    for stage, _ in stages.values():
        assert stage.guide is None or order.index(stage.guide.key) < order.index(stage.key)


def test_the_whole_chain_varies_with_the_seed_or_the_student_alone() -> None:
    chosen: dict[str, Any] = {"rows": ("plane",), "seeds": (0, 1)}
    chain = [job.student.chain for job in planned("takd_cifar10", **chosen).jobs if len(job.student.chain) == 3]
    assert [[stage.seed for stage in stages] for stages in chain] == [[0, 0, 0], [1, 1, 1]]  # type: ignore[union-attr]
    over_one = [job.student.chain for job in planned("takd_cifar10", vary="student", **chosen).jobs]
    seeds = [[stage.seed for stage in stages] for stages in over_one if len(stages) == 3]  # type: ignore[union-attr]
    assert seeds == [[0, 0, 0], [0, 0, 1]]


@pytest.mark.slow
def test_profiles() -> None:
    full, cpu = (planned("takd_cifar10", rows=("plane",), profile=name).jobs for name in ("full", "cpu"))
    assert {job.student.train.epochs for job in full} == {160}
    assert {(job.student.train.epochs, job.student.train.schedule) for job in cpu} == {(40, "cosine")}
    for job in (*full, *cpu):
        assert (job.student.train.select, job.student.train.test_curve, job.config.mode) == ("best_val", True, "paper")
    smoke = planned(profile="smoke")
    assert {stage.dataset.name for stage, _ in smoke.stages.values()} == {"digits"}
    assert {table.table.id.partition("_")[0] for table in smoke.tables} == {
        *("takd", "size", "paths", "settings", "tt", "benchmark")
    }
    assert not {stage.model for stage, _ in smoke.stages.values()} & set(profiles()["smoke"].stand_ins)
    title = profiles()["cpu"].title
    assert "SHORTER" in title
    assert "40 epochs" in title


def test_a_setting_of_the_method_is_for_the_cells_that_have_it() -> None:
    """The cell's own settings stay."""
    overrides = "method.T=7", "method.assistant.T=9"
    found = planned("takd_cifar10", rows=("plane",), overrides=overrides)
    losses = [[getattr(stage.loss, "T", None) for stage in job.student.chain] for job in found.jobs]  # type: ignore[union-attr]
    assert losses == [[None], [None, 7], [None, 9, 7]]
    found = planned("settings_cifar10", rows=("T_blkd",), overrides=overrides[:1])
    assert [getattr(job.student.loss, "T", None) for job in found.jobs] == [None, 1, 2, 5, 10, 15, 20]


def test_another_copy_takes_the_place_of_a_data_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "jpeg")
    copies = (("cifar10", Copy(tmp_path / "jpeg", "CIFAR-10 (JPEG copy)")),)
    found = planned("takd_cifar10", "tt_cifar10", rows=("plane", "resnet18_net"), copies=copies)
    for table in found.tables:
        cell = table.rows[0].cells[-1]
        assert cell.jobs[0].config.dataset.title == "CIFAR-10 (JPEG copy)"
        assert cell.jobs[0].student.dataset.name == "folder"
        assert cell.jobs[0].config.train.recipe == "cifar10"
        assert str(tmp_path) not in cell.command
        assert "dataset.root=<jpeg>" in cell.command


def test_imagenet_is_planned_of_a_copy(tmp_path: Path) -> None:
    copies = (("imagenet", Copy(snapshots(tmp_path / "small", parts=("train", "val")), "stand-in")),)
    found = planned("takd_imagenet", copies=copies)
    chains = [[stage.model for stage in job.student.chain] for job in found.jobs]
    assert chains == [[f"resnet{depth}_imagenet" for depth in depths] for depths in ((14,), (50, 14), (50, 20, 14))]
    for stage, _ in found.stages.values():
        assert (stage.dataset.name, stage.dataset.image_size, stage.dataset.augment) == (
            "imagenet",
            224,
            "resized_crop_flip",
        )
        assert stage.train.epochs == 90


def test_a_table_without_its_images_is_left_out() -> None:
    rows = "resnet18_mobilenetv2", "resnet18_net"
    found = planned("tt_tiny_imagenet", "tt_cifar10", rows=rows)
    assert [table.table.id for table in found.tables] == ["tt_cifar10"]
    assert "tiny-imagenet-200" in found.left_out["tt_tiny_imagenet"]
    with pytest.raises(KnownError, match="tt_tiny_imagenet: "):
        planned("tt_tiny_imagenet", rows=rows[:1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": []}, ""),
        ({"dataset": None}, "tables[0].dataset: should be a text (got null)"),
        ({"colour": 1}, "tables[0].colour: unknown key (got 1)"),
        ({"rows": [{"every": "month"}]}, "one', 'pair'"),
    ],
)
def test_a_tables_problems_are_lines(change: dict[str, Any], said: str) -> None:
    tree = read_yaml("takd")
    tree["tables"] = [{**tree["tables"][0], **change}]
    if not said:
        assert parse_paper("takd", tree).tables[0].expanded == []
        return
    with pytest.raises(KnownError, match=r"^conf/paper/takd\.yaml: ") as caught:
        parse_paper("takd", tree)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"baseline": "KD"}, "row plane: has no cell KD, but NOKD, BLKD, TAKD"),
        ({"published": {"XKD": {"value": 1, "status": "verified", "source": "x"}}}, "has no cell XKD"),
        ({"published": {"NOKD": {"value": 1, "status": "sure", "source": "x"}}}, "status: should be 'verified', "),
        ({"teacher": "plane11"}, "did you mean plane10?"),
        ({"cells": [{"label": "a"}, {"label": "a"}]}, "two cells have the same label"),
        ({"cells": [{"every": "path", "through": ["plane4"]}], "student": None}, "paths need a teacher and a"),
    ],
)
def test_a_rows_problems_are_lines(change: dict[str, Any], said: str) -> None:
    tree = read_yaml("takd")
    tree["tables"][0]["rows"] = [{**tree["tables"][0]["rows"][0], **change}]
    with pytest.raises(KnownError, match=re.escape(said)):
        parse_paper("takd", tree)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"pairs": [["vgg13", "vgg8"]]},
            "published: alone, KD, FitNet, AT, SP, VID, RKD, PKT, CRD, DKD, DKD, KD stand",
        ),
        ({"pairs": [["vgg13", "vgg7"]]}, "did you mean vgg"),
        (
            {"cells": [{"label": "KD", "pairs": {"vgg13_vgg9": []}}]},
            "cells: there is no pair vgg13_vgg9, but resnet56_",
        ),
        (
            {"published": [{"source": "x", "status": "last epoch", "values": {"KD": [1.0] * 13}}] * 2},
            "published: two sources have a number of the same cell and pair",
        ),
        ({"baseline": "TAKD"}, "has no cell TAKD"),
    ],
)
def test_a_grids_problems_are_lines(change: dict[str, Any], said: str) -> None:
    tree = read_yaml("benchmark")
    tree["tables"][0]["rows"] = [{**tree["tables"][0]["rows"][0], **change}]
    with pytest.raises(KnownError, match=re.escape(said)):
        _ = [table.expanded for table in parse_paper("benchmark", tree).tables]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"tables": ("takd",)}, "table: there is no takd here, but takd_cifar10, "),
        ({"rows": ("pain",)}, "row: there is no pain here, but plane, "),
        ({"copies": (("cifar10", Copy(Path("x"), "x")),)}, "data: there is no cifar10 here, but digits"),
        (
            {"overrides": ("seed=1", "replicates=2")},
            "seed: for tables it is --seeds\nreplicates: for tables it is --seeds",
        ),
        ({"overrides": ("method.assistants=[plane8]",)}, "method.assistants: for tables it is another row"),
        pytest.param(
            {"overrides": ("method.tau=1",)},
            "method.tau=1: there is no such key in any cell's method",
            marks=pytest.mark.slow,  # all cells are planned first
        ),
        ({"overrides": ("train.epoch=1",)}, "train.epoch"),
        ({"overrides": ("train.epochs=0",)}, "train.epochs: should be at least 1 (got 0)"),
    ],
)
def test_a_wrong_request_is_lines(request_: dict[str, Any], said: str) -> None:
    with pytest.raises(KnownError, match=re.escape(said)):
        graph(Request("smoke", profiles()["smoke"], **request_))
