"""Checkpoints of other projects: every layout loads, no code in a file runs, and all mismatches are reported."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

import kd
from kd.app.config import plan
from kd.app.parsing import parse
from kd.core.spec import KnownError
from kd.core.stage import DatasetSpec, Given, Normalization
from kd.datasets import digits, resolve
from kd.models import build
from kd.store.foreign import fingerprint, initial_weights, load_network
from kd.store.weights_file import allowed_globals
from tests.conftest import composed
from tests.test_stage import DATASET

Job = Callable[..., Any]
State = dict[str, Tensor]


def network_of(name: str = "resnet8", classes: int = 10, seed: int = 0, image_size: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    network = build(name, num_classes=classes, image_size=image_size)
    network.train()(torch.rand(8, 3, image_size, image_size))  # statistics of its own
    return network.eval()


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def optimizer(network: nn.Module) -> dict[str, Any]:
    return torch.optim.SGD(network.parameters(), 0.1, 0.9).state_dict()


OPTIONS = argparse.Namespace(model="resnet8", lr=0.05, milestones=[150, 180], nested=argparse.Namespace(a=1))

# What each code saves of a network.
LAYOUTS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "TAKD": (
        "resnet8_abc_best.pth.tar",
        lambda n: {"model_state_dict": n.state_dict(), "optimizer_state_dict": optimizer(n), "epoch": 3},
    ),
    "Trained Teacher": (
        "best_model.tar",
        lambda n: {"epoch": 160, "state_dict": n.state_dict(), "optim_dict": optimizer(n)},
    ),
    "RepDistiller, an epoch": (
        "ckpt_epoch_240.pth",
        lambda n: {
            "epoch": 240,
            "model": n.state_dict(),
            "accuracy": torch.tensor(72.5),
            "optimizer": optimizer(n),
        },
    ),
    "RepDistiller, the last": ("resnet8_last.pth", lambda n: {"opt": OPTIONS, "model": n.state_dict()}),
    "mdistiller": (
        "latest",
        lambda n: {
            "epoch": 240,
            "model": {
                **prefixed("module.student.", n.state_dict()),
                **prefixed("module.teacher.", network_of("resnet14").state_dict()),
            },
            "optimizer": optimizer(n),
            "best_acc": np.float64(71.2),
        },
    ),
    "mdistiller, the student": ("student_best", lambda n: {"model": prefixed("module.", n.state_dict())}),
    "torchdistill": (
        "cifar10-resnet8.pt",
        lambda n: {
            "model": n.state_dict(),
            "optimizer": optimizer(n),
            "best_value": np.float32(90.5),
            "lr_scheduler": {"last_epoch": 3},
            "args": OPTIONS,
        },
    ),
    "bare": ("resnet8.pt", lambda n: n.state_dict()),
    "bare, of DataParallel": ("resnet8.pth", lambda n: prefixed("module.", n.state_dict())),
}


def given(model: str = "resnet8", **changes: Any) -> Given:
    normalize = Normalization(mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616))
    settings = {"role": "teacher", "model": model, "sha256": "0", "normalize": normalize}
    return Given(**{**settings, "dataset": DATASET, **changes})


def load(file: Path, **changes: Any) -> State:
    return load_network(file, given(sha256=fingerprint(file), **changes)).state_dict()


def same_logits(state: State, network: nn.Module, name: str = "resnet8") -> None:
    again = build(name, num_classes=10, image_size=16)
    again.load_state_dict(state)
    images = torch.rand(5, 3, 16, 16)
    assert torch.equal(again.eval()(images), network(images))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads(tmp_path: Path, layout: str, legacy: bool) -> None:
    name, content = LAYOUTS[layout]
    network = network_of()
    torch.save(content(network), tmp_path / name, _use_new_zipfile_serialization=not legacy)
    same_logits(load(tmp_path / name), network)


def test_safetensors(tmp_path: Path) -> None:
    network = network_of()
    for name in ("resnet8.safetensors", "resnet8.SAFETENSORS", "resnet8.pt"):
        save_file(network.state_dict(), tmp_path / name)
        same_logits(load(tmp_path / name), network)


def test_a_hint_whatever_the_order_of_names(tmp_path: Path) -> None:
    save_file(dict(sorted(network_of("resnet14", classes=7).state_dict().items())), tmp_path / "r14.safetensors")
    assert "it is a resnet14 of 7 classes" in refused(tmp_path / "r14.safetensors")


def test_numpy_ones_name_of_its_scalars(tmp_path: Path) -> None:
    """Files of numpy 1 contain numpy.core, those of numpy 2 numpy._core."""
    file, network = tmp_path / "old.pth", network_of()
    content = {"model": network.state_dict(), "best": np.float64(9), "n": np.int64(3)}
    torch.save(content, file, _use_new_zipfile_serialization=False)
    assert b"numpy._core" in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    same_logits(load(file), network)


def test_files_of_old_have_no_num_batches_tracked(tmp_path: Path) -> None:
    network = network_of()
    state = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pt")
    same_logits(load(tmp_path / "old.pt"), network)


def test_of_two_networks_that_fit_one_must_be_named(tmp_path: Path) -> None:
    student, teacher = network_of(seed=1), network_of(seed=2)
    state = {**prefixed("student.", student.state_dict()), **prefixed("teacher.", teacher.state_dict())}
    torch.save({"model": state}, tmp_path / "both.pt")
    with pytest.raises(KnownError, match=r"teacher.part: .* holds student and teacher, and both fit"):
        load(tmp_path / "both.pt")
    same_logits(load(tmp_path / "both.pt", part="student"), student)
    same_logits(load(tmp_path / "both.pt", part="teacher"), teacher)
    torch.save(student.state_dict(), tmp_path / "one.pt")
    with pytest.raises(KnownError, match=r"has no student that fits; it holds one network"):
        load(tmp_path / "one.pt", part="student")


# every weight is there, under other names or beside others -------------------------------------------------------


def told(file: Path, model: str = "resnet8", **changes: Any) -> tuple[State, list[str]]:
    lines: list[str] = []
    return load_network(file, given(model, sha256=fingerprint(file), **changes), lines.append).state_dict(), lines


BESIDE: dict[str, Callable[[State], Any]] = {
    "kuangliu": lambda state: {"net": state, "acc": 93.1, "epoch": 199},
    "every name behind net.": lambda state: prefixed("net.", state),
    "Lightning with a criterion": lambda state: {
        "state_dict": {**prefixed("model.", state), "criterion.weight": torch.ones(10)},
        "pytorch-lightning_version": "2.4.0",
    },
    "a profiler's counts": lambda state: {
        **state,
        "total_ops": torch.zeros(1),
        "conv1.total_ops": torch.zeros(1),
        "conv1.total_params": torch.zeros(1),
    },
    "AveragedModel": lambda state: {**prefixed("module.", state), "n_averaged": torch.tensor(9)},
    "an unknown holder": lambda state: {"generator": {"weights": state}, "discriminator": {"w": torch.ones(2)}},
}


@pytest.mark.parametrize("kind", BESIDE)
def test_every_weight_is_found(tmp_path: Path, kind: str) -> None:
    network = network_of()
    torch.save(BESIDE[kind](network.state_dict()), tmp_path / "net.pt")
    state, lines = told(tmp_path / "net.pt")
    same_logits(state, network)
    beside = {"criterion.weight", "total_ops", "n_averaged"}
    assert sum(any(name in line for name in beside) for line in lines) == len(lines)
    begins, _ = begun(tmp_path / "net.pt")
    same_logits(begins.state_dict(), network)


def test_a_deeper_network_is_not_the_network_with_entries_beside(tmp_path: Path) -> None:
    torch.save({"net": network_of("resnet14").state_dict()}, tmp_path / "r14.pt")
    assert "36 unexpected" in refused(tmp_path / "r14.pt")


@pytest.mark.parametrize("names", [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("net", "ema")])
def test_averaged_weights_are_said_and_chosen(tmp_path: Path, names: tuple[str, str]) -> None:
    raw, averaged = network_of(seed=1), network_of(seed=2)
    torch.save(dict(zip(names, (raw.state_dict(), averaged.state_dict()), strict=True)), tmp_path / "both.pt")
    state, lines = told(tmp_path / "both.pt")
    same_logits(state, raw)
    assert lines == [f"both.pt: {names[0]} are the weights; teacher.part=ema takes the averaged ones ({names[1]})"]
    state, lines = told(tmp_path / "both.pt", part="ema")
    same_logits(state, averaged)
    assert lines == [f"both.pt: {names[1]} are the weights, averaged over steps"]
    assert given(part="ema").key != given().key


def test_of_several_that_fit_a_key_chooses(tmp_path: Path) -> None:
    one, other = network_of(seed=1), network_of(seed=2)
    torch.save({"a": one.state_dict(), "b": {"c": other.state_dict()}}, tmp_path / "two.pt")
    assert "holds a and b.c, and all of them fit: teacher.key=" in refused(tmp_path / "two.pt")
    same_logits(told(tmp_path / "two.pt", entry="b.c")[0], other)
    with pytest.raises(KnownError, match=r"teacher\.key: .* has no d with tensors; it has a and b\.c"):
        told(tmp_path / "two.pt", entry="d")
    torch.save({"a": one.state_dict(), "b": one.state_dict()}, tmp_path / "same.pt")
    same_logits(told(tmp_path / "same.pt")[0], one)


def test_torchvisions_names_with_a_small_stem(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    theirs.train()(torch.rand(4, 3, 16, 16))
    torch.save(theirs.state_dict(), tmp_path / "r18.pt")
    state, lines = told(tmp_path / "r18.pt", "resnet18")
    same_logits(state, theirs.eval(), "resnet18")
    assert lines == ["r18.pt: names of other code are read as ours: downsample → shortcut, fc → linear"]


def test_a_network_of_torchvision_is_named(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(num_classes=1000).state_dict(), tmp_path / "resnet18-f37072fd.pth")
    with pytest.raises(KnownError) as caught:
        told(tmp_path / "resnet18-f37072fd.pth", "resnet18")
    line = str(caught.value).splitlines()[1]
    assert "its names are those of torchvision/resnet18 of 1000 classes: teacher=torchvision " in line
    assert "teacher.arch=resnet18" in line
    assert "teacher.init=" in line


def _pack_tar(file: Path) -> None:
    with tarfile.open(file, "w") as packed:
        packed.add(__file__, "a.py")


def _pack_zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("a.jpg", b"0")


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "lfs": (
        lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "is a pointer of Git LFS, not the file itself: git lfs pull",
    ),
    "html": (lambda file: file.write_text("\n<!DOCTYPE html>\n<html></html>"), "is a web page"),
    "tar": (lambda file: _pack_tar(file), "is a tar archive: unpack it"),
    "zip": (lambda file: _pack_zip(file), "is a zip archive of other files"),
    "gzip": (lambda file: file.write_bytes(b"\x1f\x8b\x08"), "is compressed by gzip"),
    "keras": (lambda file: file.write_bytes(b"\x89HDF\r\n"), "is an HDF5 file"),
    "picture": (lambda file: file.write_bytes(b"\x89PNG\r\n"), "is a picture"),
    "index": (lambda file: file.write_text('{"metadata": {}, "weight_map": {}}'), "is the index of weights"),
    "json": (lambda file: file.write_text('\n{"epoch": 3}'), "is JSON, which holds no tensors"),
    "script": (lambda file: torch.jit.script(nn.Linear(2, 2)).save(file), "is a TorchScript archive, which holds code"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, kind: str) -> None:
    write, what = OTHERS[kind]
    write(tmp_path / "net.pt")
    assert what in refused(tmp_path / "net.pt")


# what does not fit ------------------------------------------------------------------------------------------------


def refused(file: Path) -> str:
    with pytest.raises(KnownError) as caught:
        load(file)
    return str(caught.value)


def test_another_depth_and_number_of_classes_at_once(tmp_path: Path) -> None:
    torch.save(network_of("resnet14", classes=100).state_dict(), tmp_path / "r14.pt")
    first, *lines = refused(tmp_path / "r14.pt").splitlines()
    assert "is not a resnet8 of 10 classes for 16×16 images; it is a resnet14 of 100 classes" in first
    assert "36 unexpected: layer1.1.conv1.weight, layer1.1.bn1.weight" in lines[0]
    assert "2 of another shape: fc.weight [100, 64] instead of [10, 64], fc.bias [100] instead of [10]" in lines[1]


def test_missing_weights_are_named(tmp_path: Path) -> None:
    state = network_of().state_dict()
    del state["fc.bias"], state["conv1.weight"]
    torch.save(state, tmp_path / "holes.pt")
    assert "2 missing: conv1.weight, fc.bias" in refused(tmp_path / "holes.pt")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    state = network_of().state_dict()
    state["fc.bias"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    assert "not finite in fp32: fc.bias" in refused(tmp_path / "nan.pt")


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


KINDS: dict[str, Callable[[], Tensor]] = {
    "sparse_coo": lambda: torch.zeros(10).to_sparse(),
    "int32": lambda: torch.zeros(10, dtype=torch.int32),
    "complex64": lambda: torch.zeros(10, dtype=torch.complex64),
    "meta": lambda: torch.zeros(10, device="meta"),
    "qint8": lambda: torch.quantize_per_tensor(torch.zeros(10), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of kinds that it is about to drop
def test_tensors_that_are_no_weights(tmp_path: Path, kind: str) -> None:
    torch.save({**network_of().state_dict(), "fc.bias": KINDS[kind]()}, tmp_path / "odd.pt")
    text = refused(tmp_path / "odd.pt")
    assert "1 of another kind: fc.bias" in text
    assert kind in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_other_precisions_are_copied(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in network_of().state_dict().items()}
    torch.save(state, tmp_path / "half.pt")
    for name, tensor in load(tmp_path / "half.pt").items():
        assert torch.equal(tensor, state[name].to(tensor.dtype))


def test_what_fp32_cannot_hold(tmp_path: Path) -> None:
    state = {name: t.double() for name, t in network_of().state_dict().items()}
    state["fc.bias"][0] = 1e300
    torch.save(state, tmp_path / "large.pt")
    assert "not finite in fp32: fc.bias" in refused(tmp_path / "large.pt")


@pytest.mark.parametrize(
    "prefix", ["module.module.", "_orig_mod.", "model.", "network.", "module._orig_mod.", "model.student."]
)
def test_whatever_wrapped_the_network(tmp_path: Path, prefix: str) -> None:
    network = network_of()
    torch.save(prefixed(prefix, network.state_dict()), tmp_path / "wrapped.pt")
    same_logits(load(tmp_path / "wrapped.pt"), network)


def test_a_file_that_changed_since_it_was_planned_with(tmp_path: Path) -> None:
    torch.save(network_of().state_dict(), tmp_path / "net.pt")
    with pytest.raises(KnownError, match="has changed since this run began"):
        load_network(tmp_path / "net.pt", given(sha256="0"))


def test_nothing_else_is_allowed() -> None:
    kinds = [g for g in allowed_globals() if isinstance(g, type) and issubclass(g, np.dtype) and g is not np.dtype]
    assert all(kind().kind in "biuf" for kind in kinds)  # numbers: no objects, no text
    rest = [g[1] if isinstance(g, tuple) else g for g in allowed_globals() if g not in kinds]
    assert rest == [
        argparse.Namespace,
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        np.dtype,
    ]


class Calls:
    """Calls anything when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("function", ["eval", "touch", "Popen", "getattr"])
def test_whatever_it_calls_is_not_called(tmp_path: Path, function: str, nested: bool) -> None:
    trace = tmp_path / "pwned"
    evil = {
        "eval": Calls(eval, f"open({str(trace)!r}, 'w')"),
        "touch": Calls(Path.touch, trace),
        "Popen": Calls(subprocess.Popen, ["touch", str(trace)]),
        "getattr": Calls(getattr, trace, "touch"),
    }[function]
    content = {"model": network_of().state_dict(), "opt": argparse.Namespace(a=evil) if nested else evil}
    torch.save(content, tmp_path / "evil.pth")
    assert "it needs the Python object" in refused(tmp_path / "evil.pth")
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, kind: str) -> None:
    file, trace = tmp_path / "evil.pth", tmp_path / "pwned"
    content = {"model": network_of().state_dict(), "epoch": Evil(f"touch {trace}")}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    text = refused(file)
    assert "\n" not in text
    assert "cannot be loaded as weights and plain data alone" in text
    assert kind == "pickle" or "needs the Python object posix.system" in text
    assert not trace.exists()


def test_a_run_refuses_a_malicious_pickle_in_one_line(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, trace = tmp_path / "evil.pth", tmp_path / "pwned"
    file.write_bytes(pickle.dumps({"model": network_of().state_dict(), "epoch": Evil(f"touch {trace}")}))
    job("teacher=resnet8", f"teacher.checkpoint={file}", code=2)
    assert capsys.readouterr().err.count("\n") == 1
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"half of a", "cannot be loaded as weights and plain data alone"),
        (b"PK\x03\x04 torn", r"cannot be loaded as .* alone \(it is cut short or damaged, copy it again: "),
        ({"epoch": 3, "weights": 4}, "holds no weights: .* its keys are epoch, weights"),
        ([1, 2], "holds no weights"),
        ({}, "holds no weights"),
        ({"model": {}}, "holds no weights"),
        (torch.zeros(3), "holds no weights"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "file.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(KnownError, match=message):
        load(file)
    (tmp_path / "file.safetensors").write_bytes(b"no header")
    with pytest.raises(KnownError, match="cannot be read"):
        load(tmp_path / "file.safetensors")


# initial weights --------------------------------------------------------------------------------------------------


def begun(file: Path, model: str = "resnet8", classes: int = 10) -> tuple[nn.Module, str | None]:
    return initial_weights(file, fingerprint(file), model, num_classes=classes, image_size=16, key="teacher.init")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights_of_every_layout(tmp_path: Path, layout: str) -> None:
    name, content = LAYOUTS[layout]
    network = network_of()
    torch.save(content(network), tmp_path / name)
    begins, line = begun(tmp_path / name)
    assert line is None
    same_logits(begins.eval().state_dict(), network)


def test_initial_weights_are_said_where_a_file_has_averaged_ones_too(tmp_path: Path) -> None:
    """No setting chooses the others."""
    file, lines = tmp_path / "both.pt", list[str]()
    torch.save({"model": network_of(seed=1).state_dict(), "model_ema": network_of(seed=2).state_dict()}, file)
    initial_weights(file, fingerprint(file), "resnet8", num_classes=10, image_size=16, tell=lines.append)
    assert lines == ["both.pt: model are the weights; not the averaged ones (model_ema)"]


def test_a_classifier_of_other_classes_is_made_anew(tmp_path: Path) -> None:
    network = network_of(classes=1000)
    torch.save(prefixed("module.", network.state_dict()), tmp_path / "net.pt")
    torch.manual_seed(1)
    begins, line = begun(tmp_path / "net.pt", classes=3)
    assert line == "resnet8: its classifier of 1,000 classes is made anew for 3"
    state, before = begins.state_dict(), network.state_dict()
    weight, bias = state.pop("fc.weight"), state.pop("fc.bias")
    assert weight.shape == (3, 64)
    assert 0.008 < float(weight.std()) < 0.012
    assert not bias.any()
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name]), name
    torch.manual_seed(1)
    assert torch.equal(begun(tmp_path / "net.pt", classes=3)[0].state_dict()["fc.weight"], weight)


def test_a_file_without_a_classifier(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in network_of().state_dict().items() if not name.startswith("fc.")}
    torch.save(state, tmp_path / "body.pt")
    _, line = begun(tmp_path / "body.pt")
    assert line == "resnet8: its file has no classifier; one is made anew for 10"


def test_everything_but_the_classifier_has_to_fit(tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    torch.save(network_of("resnet14", classes=5).state_dict(), file)
    with pytest.raises(KnownError) as caught:
        begun(file, classes=3)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(
        f"teacher.init: {file} is not a resnet8 of 3 classes for 16×16 images; it is a resnet14 of 5"
    )
    assert len(lines) == 1  # the classes are no reason
    assert "36 unexpected: layer1.1.conv1.weight" in lines[0]
    state = network_of(classes=5).state_dict()
    torch.save({**state, "fc.weight": state["fc.weight"][:, 1:]}, file)
    with pytest.raises(KnownError, match=r"2 of another shape: fc\.weight \[5, 63\] instead of \[3, 64\]"):
        begun(file, classes=3)
    torch.save({**state, "conv1.weight": state["conv1.weight"] * float("nan")}, file)
    with pytest.raises(KnownError, match=r"^teacher\.init: .* not finite in fp32: conv1\.weight"):
        begun(file, classes=3)
    with pytest.raises(KnownError, match=r"^model\.init: .* has changed since this run began"):
        initial_weights(file, "0", "resnet8", num_classes=3, image_size=16, key="model.init")
    file.write_bytes(b"half of a")
    with pytest.raises(KnownError, match=r"^teacher\.init: .* cannot be loaded as weights and plain data alone"):
        begun(file)
    with pytest.raises(KnownError, match=r"^teacher\.init: .* cannot be read"):
        fingerprint(tmp_path / "nowhere", "teacher.init")


def test_of_two_networks_that_could_begin_none_is_taken(tmp_path: Path) -> None:
    state = {**prefixed("student.", network_of(seed=1).state_dict()), **prefixed("teacher.", network_of().state_dict())}
    torch.save(state, tmp_path / "both.pt")
    with pytest.raises(KnownError, match=r"^teacher\.init: .* holds student and teacher, and both fit; save one"):
        begun(tmp_path / "both.pt", classes=7)


def test_a_given_teacher_of_other_classes_says_what_helps(tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    torch.save(network_of(classes=100).state_dict(), file)
    first, shapes, help_ = refused(file).splitlines()
    assert first.endswith("it is a resnet8 of 100 classes")
    assert "2 of another shape: fc.weight [100, 64] instead of [10, 64]" in shapes
    assert f"everything but the classifier fits: teacher.init={file} makes a new one for 10 classes" in help_
    torch.save(network_of("resnet14", classes=100).state_dict(), file)
    assert "teacher.init" not in refused(file)


# keys -------------------------------------------------------------------------------------------------------------


def test_what_names_somebodys_weights() -> None:
    one = given()
    assert given(role="reference").key == one.key
    others = [
        given("resnet14"),
        given(sha256="1"),
        given(part="student"),
        given(normalize=Normalization(mean=(0, 0, 0), std=(1, 1, 1))),
        given(dataset=DatasetSpec(**{**DATASET.model_dump(), "augment": "crop_flip"})),
    ]
    assert len({one.key, *(other.key for other in others)}) == 6


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"content")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"another")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    with pytest.raises(KnownError, match="cannot be read"):
        fingerprint(tmp_path / "c")


# a run ------------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, name: str = "plane4") -> tuple[Path, nn.Module]:
    network = network_of(name)
    torch.save({"state_dict": network.state_dict(), "epoch": 1}, tmp_path / "best_model.tar")
    return tmp_path / "best_model.tar", network


def test_a_run_on_given_weights(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = job("method=scratch", "model=plane4", folder="own")["chain"][0]
    network = kd.load(own["key"], tmp_path / "store").network  # one that can tell how it sees images
    file = tmp_path / "best_model.tar"
    torch.save({"state_dict": network.state_dict()}, file)
    stats = "{mean: [0.1, 0.2, 0.3], std: [0.5, 0.6, 0.7]}"
    result = job(f"teacher.checkpoint={file}", f"teacher.normalize={stats}")
    teacher, student = result["chain"]
    out = capsys.readouterr().out
    assert f"teacher plane4: best_model.tar has {teacher['test_acc']:.2f} % on the test set" in out
    assert " given" in out
    assert (teacher["role"], teacher["seed"], teacher["loss"], teacher["epochs"]) == ("teacher", None, None, 0)
    assert teacher["val_acc"] is None
    assert Normalization(**teacher["normalize"]) == Normalization(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assert "given weights, teacher.normalize is mean 0.1/0.2/0.3, std 0.5/0.6/0.7" in out
    assert (student["role"], student["reused"]) == ("student", False)
    back = kd.load(teacher["key"], tmp_path / "store")
    images = torch.rand(4, 3, 16, 16)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    torch.testing.assert_close(back(images), network((images - mean) / std))
    arrays = digits.read(tmp_path, None)
    scans = torch.from_numpy(arrays.test_images).permute(0, 3, 1, 2) / 255
    labels = torch.from_numpy(arrays.test_labels)

    def accuracy(mean: Tensor | float, std: Tensor | float) -> float:
        with torch.no_grad():
            return 100 * (network((scans - mean) / std).argmax(1) == labels).double().mean().item()

    assert teacher["test_acc"] == pytest.approx(accuracy(mean, std), abs=1e-3)
    assert teacher["test_acc"] != own["test_acc"] == pytest.approx(accuracy(0.30543, 0.37534), abs=1e-3)
    file.rename(tmp_path / "moved.tar")  # a path decides nothing
    again = job(f"teacher.checkpoint={tmp_path / 'moved.tar'}", f"teacher.normalize={stats}")
    assert [outcome["reused"] for outcome in again["chain"]] == [True, True]
    other = job(f"teacher.checkpoint={tmp_path / 'moved.tar'}")
    assert other["chain"][1]["key"] != student["key"]
    assert str(tmp_path) not in (tmp_path / "store" / teacher["key"] / "stage.json").read_text()


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("kuangliu", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("trained_teacher", (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ],
)
def test_normalisations_have_names(name: str, mean: tuple[float, ...], std: tuple[float, ...], tmp_path: Path) -> None:
    torch.save(network_of("plane4").state_dict(), tmp_path / "t.pt")
    teacher = parse(composed(f"teacher.checkpoint={tmp_path}/t.pt", f"teacher.normalize={name}")).teacher
    assert teacher.normalize is not None
    assert (teacher.normalize.mean, teacher.normalize.std) == (mean, std)


@pytest.mark.parametrize("normalize", ["null", "imagenet"])
def test_a_named_normalisation_keeps_the_teachers_own_size(normalize: str, tmp_path: Path) -> None:
    torch.save(network_of("plane4").state_dict(), tmp_path / "t.pt")
    asked = f"teacher.checkpoint={tmp_path}/t.pt", f"teacher.normalize={normalize}", "teacher.image_size=32"
    config = parse(composed("teacher=plane4", *asked))
    student = plan(config, resolve(config.dataset, config.data_root))[0]
    assert (student.guides[0].input_size, student.input_size) == (32, 16)


def test_an_unknown_normalisation_lists_the_names(tmp_path: Path) -> None:
    torch.save(network_of("plane4").state_dict(), tmp_path / "t.pt")
    with pytest.raises(KnownError, match=r"teacher\.normalize: should be one of .*kuangliu, imagenet, or .*'kuang'"):
        parse(composed(f"teacher.checkpoint={tmp_path}/t.pt", "teacher.normalize=kuang"))


# What is wrong with a file that should have the weights of plane4, and what is said of it.
MISFITS: dict[str, tuple[Callable[[State], Any], str]] = {
    "another network": (lambda _: network_of("resnet14").state_dict(), "unexpected"),
    "a weight is missing": (lambda state: dict([*state.items()][1:]), "1 missing"),
    "a weight of another shape": (lambda state: {**state, min(state): torch.zeros(3, 3)}, "1 of another shape"),
    "a weight that is not finite": (lambda state: {**state, min(state): state[min(state)] / 0}, "not finite in fp32"),
    "integers": (lambda state: {name: tensor.long() for name, tensor in state.items()}, "of another kind"),
    "no tensors": (lambda _: {"epoch": 3}, "holds no weights"),
    "a web page": (lambda _: b"<!doctype html><html></html>", "is a web page"),
}
CHAIN = ("model=plane2", "teacher=plane6", "method=ta", "method.assistants=[plane4]")
KEYS: dict[str, tuple[str, ...]] = {
    "teacher.checkpoint": (),
    "teacher.init": (),
    "model.init": ("model=plane4", "teacher=plane6"),
    "init.plane4": (*CHAIN,),
}


@pytest.mark.parametrize(
    ("key", "kind", "more"),
    [
        *[("teacher.checkpoint", kind, ()) for kind in MISFITS],
        ("teacher.checkpoint", "a weight is missing", ("teacher.key=state_dict",)),
        ("teacher.init", "another network", ()),
        ("teacher.init", "a weight of another shape", ("teacher.freeze=backbone",)),
        ("model.init", "a weight is missing", ()),
        ("model.init", "a weight that is not finite", ("method=scratch",)),
        ("init.plane4", "another network", ()),
        ("init.plane4", "integers", ()),
    ],
)
def test_a_dry_run_refuses_every_file_that_the_run_refuses(
    key: str,
    kind: str,
    more: tuple[str, ...],
    job: Job,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for hint in ("_recognize", "_library_of"):  # which build every network, and are tested above
        monkeypatch.setattr(f"kd.store.foreign.{hint}", lambda *_: "")
    content, message = MISFITS[kind]
    file, made = tmp_path / "weights.pt", content(network_of("plane4").state_dict())
    file.write_bytes(made) if isinstance(made, bytes) else torch.save(made, file)
    name = f"+{key}" if key.startswith("init.") else key
    said = []
    for dry in ("true", "false"):
        job(*KEYS[key], f"{name}={file}", *more, f"dry_run={dry}", code=2)
        out, err = capsys.readouterr()
        assert " epoch " not in out
        said.append(err)
    assert said[0] == said[1]
    assert ("teacher.key" if more == ("teacher.key=state_dict",) else message) in said[0]
    assert not (tmp_path / "store").exists() or not [*(tmp_path / "store").glob("*/stage.json")]


def test_a_dry_run_refuses_other_classes_where_the_run_does(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A given teacher's classifier has to fit; initial weights get a new one, and the dry run says so."""
    file = tmp_path / "weights.pt"
    torch.save(network_of("resnet8", classes=100).state_dict(), file)
    job("teacher=resnet8", f"teacher.checkpoint={file}", "dry_run=true", code=2)
    assert "is not a resnet8 of 10 classes" in capsys.readouterr().err
    job("teacher=resnet8", f"teacher.init={file}", "dry_run=true", multirun=True)
    assert "teacher resnet8: its classifier of 100 classes is made anew for 10" in capsys.readouterr().out


def test_a_dry_run_shows_what_is_given(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, _ = saved(tmp_path)
    job("dry_run=true", "replicates=2", f"teacher.checkpoint={file}", multirun=True)
    assert "given; teacher.normalize is mean 0.3054" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("given_weights", [True, False])
def test_a_bad_teacher_teaches_nobody(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], given_weights: bool
) -> None:
    extra = [f"teacher.checkpoint={saved(tmp_path)[0]}"] if given_weights else []
    job("teacher.min_acc=99.9", *extra, multirun=True, code=1)
    said = capsys.readouterr()
    assert "less than teacher.min_acc=99.9: nothing is trained on it" in said.err
    assert ("teacher.normalize is mean 0.3054/0.3054/0.3054" in said.err) == given_weights
    assert ("that is near chance: check the file" in said.out) == given_weights
    assert len([*(tmp_path / "store").glob("*/result.json")]) == 1  # the teacher's alone
    for folder in ("out", "again"):  # the second run reuses both
        teacher = job("teacher.min_acc=1", *extra, folder=folder)["chain"][0]
        alarm = f"teacher plane4 has {teacher['test_acc']:.2f} % on the test set: that is near chance: check the file"
        assert (len(teacher["alarms"]) == 1) == given_weights
        assert (f"alarm: {alarm}, and teacher.normalize" in capsys.readouterr().out) == given_weights


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("teacher.train.epochs=3",), "teacher.train.epochs: a teacher from teacher.checkpoint is not trained"),
        (("method=trained_teacher",), "teacher.checkpoint: method=trained_teacher trains its own teacher"),
        (
            ("method=multi_teacher", "method.teachers=[resnet20,resnet14]"),
            "teacher=plane4 should be one of method.teachers (got [resnet20,resnet14])",
        ),
        (("model=plane2", "teacher=plane6"), "is not a plane6 of 10 classes for 16×16 images; it is a plane4"),
    ],
)
def test_what_a_given_teacher_excludes(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], message: str
) -> None:
    file, _ = saved(tmp_path)
    job(f"teacher.checkpoint={file}", *overrides, code=2)
    assert message in capsys.readouterr().err
