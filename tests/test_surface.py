"""`python -m kd.inspection.surface`: the loss around networks, along filter-normalised directions."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from kd.core.spec import KnownError
from kd.core.stage import DIRECTION, random_stream
from kd.datasets import digits
from kd.models import build
from kd.models.normalization import Normalized
from kd.store import Store
from kd.tools.inspection.landscape import draw_direction, losses, normalized
from kd.tools.inspection.surface import Landscape, Surface, levels, main, spread_over_classes, write_surface
from tests.test_datasets import write_folder
from tests.test_faults import trained
from tests.test_photos import photographs, root
from tests.test_stage import DATASET, stage

__all__ = ["root"]  # the fixture

Job = Callable[..., Any]

TEST = digits.read(Path(), None)
AXIS = np.array([-1.0, 0.0, 1.0])


@pytest.fixture
def tiny() -> nn.Module:
    """A convolution, BatchNorm with statistics of its own, and a linear layer."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )
    with torch.no_grad():
        network[0].weight[2] = 0  # a filter that is dead stays so
        network.train()(torch.rand(16, 3, 8, 8))
    return network


def rng(seed: int = 0) -> np.random.Generator:
    return random_stream(seed, 0, DIRECTION)


def test_a_direction_is_as_long_as_each_filter(tiny: nn.Module) -> None:
    direction = draw_direction(tiny, rng())
    assert direction.keys() == dict(tiny.named_parameters()).keys()
    for name, weight in tiny.named_parameters():
        if name in ("0.weight", "5.weight"):
            torch.testing.assert_close(direction[name].flatten(1).norm(dim=1), weight.detach().flatten(1).norm(dim=1))
        else:
            assert not direction[name].any()
    again, other = draw_direction(tiny, rng()), draw_direction(tiny, rng(1))
    assert all(torch.equal(direction[name], again[name]) for name in direction)
    assert not torch.equal(direction["0.weight"], other["0.weight"])


def test_the_grid(tiny: nn.Module) -> None:
    """The middle is the plain loss to the bit. The corners are the losses of weights moved there. Rows are y."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(300, 3, 8, 8, generator=generator)
    labels = torch.randint(10, (300,), generator=generator)
    stream = rng()
    first, second = draw_direction(tiny, stream), draw_direction(tiny, stream)
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    grid = np.array(list(losses(tiny, (first, second), AXIS, inputs, labels)))
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())
    with torch.inference_mode():
        parts = [
            cross_entropy(tiny.eval()(batch), right, reduction="sum").double()
            for batch, right in zip(inputs.split(250), labels.split(250), strict=True)
        ]
        assert grid[1, 1] == (sum(parts) / 300).item()
        for x, y in ((1, 0), (0, 1), (-1, 1)):
            for name, weight in tiny.named_parameters():
                weight.copy_(before[name] + x * first[name] + y * second[name])
            expected = cross_entropy(tiny(inputs), labels).item()
            assert grid[1 + y, 1 + x] == pytest.approx(expected, rel=1e-5)
            assert expected != pytest.approx(grid[1, 1], rel=1e-3)


@pytest.mark.parametrize("size", [None, 32])
def test_networks_within_see_what_they_would(size: int | None) -> None:
    within = build("plane2", num_classes=10, image_size=size or 16)
    network = Normalized(within, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2), size=size, interpolation="bicubic").double().eval()
    images = torch.from_numpy(TEST.test_images[:5]).permute(0, 3, 1, 2)
    inputs = normalized(network, images)
    assert inputs.dtype == torch.float64
    assert torch.equal(network.network(inputs), network(images))


def test_images_are_spread_over_the_classes() -> None:
    labels = np.repeat([2, 0, 1], [10, 20, 30])
    for number in (6, 13, 59):
        chosen = spread_over_classes(labels, number)
        assert len(set(chosen.tolist())) == number
        np.testing.assert_allclose(np.bincount(labels[chosen]), number * np.array([20, 30, 10]) / 60, atol=1)
    assert sorted(spread_over_classes(labels, 100)) == list(range(60))


@pytest.mark.slow
def test_the_command(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, student = (outcome["key"] for outcome in job("method=kd")["chain"])
    capsys.readouterr()
    written = {}
    for name in ("surface", "again"):
        command = [student[:10], teacher, student, "--out", str(tmp_path / name), "--points", "3", "--span", "0.5"]
        assert main(command) == 0
        assert {path.name for path in (tmp_path / name).iterdir()} == {"surface.json", "surface.svg", "surface.png"}
        written[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert written["surface"] == written["again"]

    told = json.loads(written["surface"]["surface.json"])
    assert [each["key"] for each in told["networks"]] == [student, teacher]  # each once
    assert (told["images"], told["axis"], told["dataset"]) == (360, [-0.5, 0, 0.5], "digits")
    images, labels = torch.from_numpy(TEST.test_images).permute(0, 3, 1, 2), torch.from_numpy(TEST.test_labels.copy())
    for each in told["networks"]:
        with torch.inference_mode():
            plain = cross_entropy(Store(Path(os.environ["KD_STORE"])).network(each["key"])(images), labels).item()
        assert each["losses"][1][1] == pytest.approx(plain, abs=1e-5)
        assert len({loss for row in each["losses"] for loss in row}) == 9
    shown = capsys.readouterr().out
    assert f"2 of 2: teacher plane4 {teacher}: row 1 of 3, about " in shown
    ElementTree.fromstring(written["surface"]["surface.svg"])


@pytest.mark.slow
def test_each_stage_sees_squares_of_its_own_size(job: Job, root: Path, tmp_path: Path) -> None:
    run = [*photographs(root, "stream"), "method=scratch", "model=plane2", "train.epochs=1"]
    sizes = [job(*run, f"dataset.image_size={size}", folder=f"{size}")["chain"][0]["key"] for size in (24, 40)]
    told = []
    for name, keys in (("both", sizes), ("second", sizes[1:])):
        assert main([*keys, "--out", str(tmp_path / name), "--points", "3"]) == 0
        told.append(json.loads((tmp_path / name / "surface.json").read_text())["networks"][-1])
    assert told[0] == told[1]


def surface(*grids: list[list[float]]) -> Surface:
    networks = tuple(
        Landscape(key=f"{i:016x}", name="plane2", losses=tuple(map(tuple, grid))) for i, grid in enumerate(grids)
    )
    return Surface(
        dataset="digits", content=None, images=360, span=1, seed=0, axis=(-1, 0, 1), networks=networks, made_with={}
    )


def test_panels_share_their_levels(tmp_path: Path) -> None:
    low, high = [[3, 2, 3], [2, 0.5, 2], [3, 2, 3.0]], [[90, 20, 30], [20, 1, 20], [30, 20, 30.0]]
    found = levels(surface(low, high))
    assert (found[0], found[-1]) == (0.5, pytest.approx(90))
    write_surface(surface([[1.0] * 3] * 3), tmp_path)  # one that is flat can be drawn too
    write_surface(surface([[0.0] * 3] * 3, high), tmp_path)


def test_what_cannot_be_drawn(job: Job, tmp_path: Path) -> None:
    write_folder(tmp_path / "pets")
    chosen = "method=scratch", "train.epochs=1", "dataset.val_fraction=0.5"
    pets = job(*chosen, "dataset=folder", f"dataset.root={tmp_path / 'pets'}", folder="pets")["chain"][0]["key"]
    key = job(*chosen, folder="digits")["chain"][0]["key"]
    out = ["--out", str(tmp_path / "surface")]
    for wrong, problem in {
        (key, "nosuchkey"): "^nosuchkey: should be the key of one finished stage",
        (key, pets): rf"should have been trained on the same images \({key} those of digits, {pets} those of folder",
        (key, "--points", "2"): r"^--points: should be at least 3 \(got 2\)$",
        (key, "--points", "4"): r"^--points: should be odd, so that one point is the network itself \(got 4\)$",
        (key, "--span", "0"): "^--span: should be above 0",
        (key, "--span", "nan"): "^--span: should be a finite number",
        (key, "--images", "0"): "^--images: should be at least 1",
        (key, "--seed", "-1"): "^--seed: should be at least 0",
        (key, "--points", "3", "--span", "1e38"): f"^stage {key}: a loss on the grid is not finite; try a ",
    }.items():
        with pytest.raises(KnownError, match=problem):
            main([*wrong, *out])
    (tmp_path / "file").touch()
    with pytest.raises(KnownError, match=r"^--out: cannot write to "):
        main([key, "--out", str(tmp_path / "file")])
    assert not list((tmp_path / "surface").iterdir())


def test_a_failure_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Store(Path(os.environ["KD_STORE"])).save(stage(dataset=DATASET), trained(1), {})
    monkeypatch.setattr(sys, "argv", ["kd.inspection.surface", "xyz", "--out", "out"])
    monkeypatch.delitem(sys.modules, "kd.inspection.surface", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("kd.inspection.surface", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("xyz: should be the key of one finished stage (no key begins with it in ")
