"""python -m kd.paper, from cost to tables: no stage is trained twice, and every number comes from its stages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kd.tools.paper.trainer
import kd.training.loop
from kd.core.spec import KnownError
from kd.core.stage import VIEWS, Stage
from kd.datasets import DatasetConfig, load_data, resolve
from kd.datasets import views as memory
from kd.datasets.data import Data
from kd.losses import LOSSES
from kd.store import Store, alarms_in
from kd.tools.paper import cost, page, report
from kd.tools.paper.cost import Cost, Estimator, forward_flops
from kd.tools.paper.gather import gather
from kd.tools.paper.graph import graph
from kd.tools.paper.reproduction import main
from kd.tools.paper.request import Copy, Request, profiles
from kd.training.workplace import RuntimeSpec, Workplace
from tests.conftest import ROOT
from tests.test_datasets import write_folder
from tests.test_every_loss import few, stage_of

__all__ = ["few"]  # the fixture

ROW = ("--table", "takd_cifar10", "--row", "plane")
TINY = (*ROW, "teacher=plane6", "train.epochs=1", "train.precision=fp32", "runtime.threads=1")


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of all stages whose training begins."""
    begun: list[str] = []
    original = kd.training.loop.train_stage

    def noted(stage: Stage, **rest: Any) -> Any:
        begun.append(stage.key)
        return original(stage, **rest)

    monkeypatch.setattr(kd.training.loop, "train_stage", noted)
    return begun


def test_a_plan_trains_nothing(tmp_path: Path, trainings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "reports"
    assert main([*TINY, "--plan", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "10 of 10 stages to train, about " in told
    assert len(re.findall(r"^(?:student|assistant|teacher) .*: to train, \d+ s$", told, re.MULTILINE)) == 10
    assert (trainings, out.exists(), (tmp_path / "store").exists()) == ([], False, False)


@pytest.mark.slow
@pytest.mark.usefixtures("a_millisecond_an_image")
def test_an_interrupted_reproduction_goes_on_and_ends_in_tables(
    tmp_path: Path, trainings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*TINY, "--out", str(tmp_path / "out")]
    original = kd.tools.paper.trainer._train

    def interrupted(*arguments: Any) -> None:
        if len(trainings) == 4:
            raise KeyboardInterrupt
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(kd.tools.paper.trainer, "_train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(given)
    assert main(given) == 0
    assert len(trainings) == len(set(trainings)) == 10
    told = capsys.readouterr().out
    assert "6 of 10 stages to train" in told
    assert "stage 6 of 6: " in told

    before = (tmp_path / "out" / "tables.json").read_text()
    assert main(given) == 0
    assert len(trainings) == 10
    assert (tmp_path / "out" / "tables.json").read_text() == before
    _look_at(report.Report.model_validate_json(before), (tmp_path / "out" / "report.md").read_text(), tmp_path)


def _look_at(report: report.Report, text: str, tmp_path: Path) -> None:
    """Every number is the one of its stages."""
    store = Store(tmp_path / "store")
    ((found,),) = [table.rows for table in report.tables]
    assert [cell.label for cell in found.cells] == ["NOKD", "BLKD", "TAKD"]
    assert [cell.chain for cell in found.cells] == ["plane2", "plane6 → plane2", "plane6 → plane4 → plane2"]
    assert [cell.varied.partition(",")[0] for cell in found.cells] == ["the student's seed", *["the whole chain"] * 2]
    base = {draw.seed: report.stages[draw.chain[-1]].test_acc for draw in found.cells[1].draws}
    for cell in found.cells:
        assert [draw.seed for draw in cell.draws] == [0, 1]
        for draw in cell.draws:
            student = report.stages[draw.chain[-1]]
            rows = (store.root / student.key / "metrics.jsonl").read_text().splitlines()
            curve = [json.loads(row) for row in rows]
            assert student.test_acc == store.result(student.key).test_acc
            assert (student.last, student.best_test) == (curve[-1]["test_acc"], max(r["test_acc"] for r in curve))
            assert all(f"`{key}`" in text for key in draw.chain)
        assert cell.test_acc is not None
        assert f"{cell.test_acc.mean:.2f} ± {cell.test_acc.std:.2f}" in text
        line = next(line for line in text.splitlines() if line.startswith(f"| {cell.label} "))
        assert ("**" in line) == (cell.against is not None and cell.against.told_apart)
        if cell.against is not None:
            differences = [report.stages[draw.chain[-1]].test_acc - base[draw.seed] for draw in cell.draws]
            assert cell.against.mean == pytest.approx(sum(differences) / 2, abs=1e-3)
    alarms = {text for key in report.stages for text in alarms_in(store.metrics(key))}
    assert alarms  # after one epoch the teachers are near chance
    assert all(f"**Alarm**, {each} (`" in text for each in alarms)
    assert "SMOKE" in text
    assert "numbers of no paper" in text
    assert "70.16 (quoted at second hand)" in text
    assert str(tmp_path) not in text + report.model_dump_json()


@pytest.mark.usefixtures("a_millisecond_an_image")
def test_what_fails_is_told_and_the_rest_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = kd.tools.paper.trainer._train

    def failing(stage: Stage, *rest: Any) -> None:
        if stage.role == "assistant":
            raise KnownError("the loss is nan")
        original(stage, *rest)

    monkeypatch.setattr(kd.tools.paper.trainer, "_train", failing)
    assert main([*TINY, "--seeds", "0", "--out", str(tmp_path / "out")]) == 1
    assert "the loss is nan" in capsys.readouterr().err
    text = (tmp_path / "out" / "report.md").read_text()
    assert "- TAKD, seed 0: **no result**, `depends on assistant plane4" in text
    assert re.search(r"^\| BLKD \| 1 \| \d\d\.\d\d \| n/a \| +\| 72\.57 ", text, re.MULTILINE)


def test_another_copy_is_named_in_its_table(tmp_path: Path) -> None:
    write_folder(tmp_path / "jpeg")
    copies = (("cifar10", Copy(tmp_path / "jpeg", "CIFAR-10 (JPEG copy)")),)
    request = Request("full", profiles()["full"], ("takd_cifar10",), ("plane",), (0,), copies)
    report = gather(request, "…", graph(request), Store(tmp_path / "store"), {}, lambda stages: 0)
    page.write_report(report, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Our numbers are on **CIFAR-10 (JPEG copy)**; published numbers are on cifar10." in text
    assert "- NOKD, seed 0: **no result**, `not trained`" in text
    assert str(tmp_path) not in text


@pytest.mark.usefixtures("a_millisecond_an_image")
def test_overrides_and_options_may_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train.epochs=1", *ROW, "--plan", "teacher=plane4", "--seeds", "3"]) == 0
    assert "student plane2 from plane4, seed 3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--seeds", "a"])
    assert "should be whole numbers, e.g. 0,1,2 (got 'a')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--profile", "fast"], "profile: should be one of smoke, cpu, full (got 'fast')"),
        (["--data", "cifar10"], "data: should be <data set>=<value> (got cifar10)"),
        (["--label", "cifar10=x"], "label: cifar10 has no --data"),
    ],
)
def test_a_wrong_command_is_a_line(given: list[str], said: str) -> None:
    with pytest.raises(KnownError, match=re.escape(said)):
        main(given)


@pytest.mark.parametrize(
    ("model", "classes", "mmacs"),
    [("resnet8", 100, 12.5), ("resnet110", 100, 253.1), ("resnet18", 100, 555), ("mobilenetv2", 100, 64.9)],
)
def test_operations_are_those_that_are_known(model: str, classes: int, mmacs: float) -> None:
    assert forward_flops(model, classes, 32) == pytest.approx(2e6 * mmacs, rel=0.01)


def test_what_is_written_down_of_data_sets_is_true(tmp_path: Path) -> None:
    for augment in ("crop_flip", "rotate_flip"):
        assert len(memory._sources(augment, 8, torch.device("cpu"))) == VIEWS[augment]
    config = DatasetConfig(name="digits", augment="none", val_fraction=0.1, split_seed=0)
    data = load_data(spec := resolve(config, tmp_path), tmp_path, "cpu")
    assert cost.count_images(spec, tmp_path) == (len(data.labels), len(data.test_labels))


@pytest.fixture
def a_millisecond_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant time for a step, so that nothing is measured."""
    monkeypatch.setattr("kd.tools.paper.cost.step_seconds", lambda stage, device, batch: batch / 1000)


@pytest.fixture
def estimate(tmp_path: Path, a_millisecond_an_image: None) -> Callable[..., list[Cost]]:
    """Costs of the plain row on CIFAR-10."""

    def of(*overrides: str, stored: int = 0, bank: bool = True) -> list[Cost]:
        request = Request("full", profiles()["full"], ("takd_cifar10",), ("plane",), (0,), overrides=overrides)
        stages = [stage for stage, _ in graph(request).stages.values()]
        place = Workplace(Store(tmp_path), tmp_path, RuntimeSpec(device="cpu", threads=1, bank=bank))
        return Estimator(place).estimate(stages, {stage.key for stage in stages[:stored]})

    return of


def test_what_a_stage_costs(estimate: Callable[..., list[Cost]]) -> None:
    nokd, teacher, blkd, assistant, takd = estimate()
    assert [cost.stage.model for cost in (nokd, teacher, assistant)] == ["plane2", "plane10", "plane4"]
    assert nokd.trained == 160 * 45_000
    assert nokd.tested == 160 * 15_000 + 10_000
    assert nokd.flops == pytest.approx((3 * nokd.trained + nokd.tested) * forward_flops("plane2", 10, 32))
    assert nokd.seconds == pytest.approx((nokd.trained + nokd.tested / 3) / 1000)
    assert blkd.guided == pytest.approx(45_000 * 162 * (1 - (161 / 162) ** 160))
    assert blkd.flops - nokd.flops == pytest.approx(blkd.guided * forward_flops("plane10", 10, 32))
    assert assistant.guided == 0  # the same seed has drawn the same views of the same guide
    assert takd.guided == blkd.guided


def test_what_is_stored_costs_nothing_and_leaves_its_views(estimate: Callable[..., list[Cost]]) -> None:
    costs = estimate(stored=3)
    assert [cost.stored for cost in costs] == [True, True, True, False, False]
    assert sum(cost.seconds for cost in costs[:3]) == 0
    assert [cost.flops for cost in costs] == [cost.flops for cost in estimate()]
    assert costs[3].guided == 0
    assert estimate(bank=False)[3].guided == 160 * 45_000


@pytest.fixture
def benchmark(tmp_path: Path, a_millisecond_an_image: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Cost]:
    """Costs of a benchmark's row by the student's loss, the first of each. A loss on features takes 64 ms a batch."""
    monkeypatch.setattr("kd.tools.paper.cost._loss_step", lambda stage, device, samples: 0.064)
    request = Request("full", profiles()["full"], ("benchmark",), ("resnet56_resnet20",), (0,))
    place = Workplace(Store(tmp_path), tmp_path, RuntimeSpec(device="cpu", threads=1))
    costs = Estimator(place).estimate([stage for stage, _ in graph(request).stages.values()], set())
    return {cost.stage.loss.name: cost for cost in costs[::-1]}


def test_logits_and_pooled_features_are_computed_once_each(benchmark: dict[str, Cost]) -> None:
    all_views = 45_000 * 162 * (1 - (161 / 162) ** 240)
    guided = {name: cost.guided for name, cost in benchmark.items() if cost.guided}
    assert guided.pop("distill") == guided.pop("rkd") == pytest.approx(all_views)
    assert guided == dict.fromkeys(("fitnet", "at", "sp", "vid", "reviewkd", "ofd"), 45_000 * 240)  # never cached


def test_a_loss_on_features_has_a_time_of_its_own(benchmark: dict[str, Cost]) -> None:
    plain = benchmark["dist"].seconds  # no view is new, and a loss on logits is not measured
    assert benchmark["pkt"].seconds - plain == pytest.approx(45_000 * 240 / 1000)
    assert benchmark["at"].seconds - plain == pytest.approx(45_000 * 240 * (1 + 1 / 3) / 1000)


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].needs - {"logits"}])
def test_the_time_of_every_loss_on_features(name: str, few: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd.training.forecast._TIMED", 0.0)
    stage = stage_of(name, few)
    assert 0 < cost._loss_step(stage, "cpu", 1000) < 5
    if name != "simkd":
        assert cost._loss_step(stage_of(name, few, guides=2, precision="fp64"), "cpu", 1000) > 0


def test_a_loss_that_cannot_be_built_has_no_time(few: Data) -> None:
    stage = stage_of("ofd", few)
    assert stage.guide is not None
    guide = stage.guide.model_copy(update={"model": "plane2"})
    assert cost._loss_step(stage.model_copy(update={"guide": guide}), "cpu", 1000) == 0


@pytest.mark.parametrize(
    ("taken", "fastest"),
    [
        ([0.5, 0.5, 0.2, 1, 0.1], 0.1),  # two busy moments
        ([0, 0, *[0.01] * 30], 0.01),  # until they add up
        ([2, 2, 2], 2),  # one of a long step is enough
    ],
)
def test_a_time_is_that_of_the_fastest_call(
    taken: list[float], fastest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([moment for took in taken for moment in (0, took)])
    monkeypatch.setattr("kd.training.forecast._now", lambda device: next(clock))
    assert cost.fastest(lambda: None, "cpu") == fastest


def test_the_makefile_hands_everything_on() -> None:
    rule = (ROOT / "Makefile").read_text().partition("PAPER = ")[2].partition("\n\nreport: ")[0]
    for name in ("PROFILE", "TABLE", "ROW", "SEEDS", "DATA", "LABEL", "VARY", "OUT", "PLAN", "SET"):
        assert f"({name}" in rule
