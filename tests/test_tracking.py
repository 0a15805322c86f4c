"""Records of a run: the local file, and W&B read back offline and from a stand-in server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import wandb
from PIL import Image
from pydantic import ValidationError

from kd.core.spec import KnownError, explain
from kd.losses import TeachableTeacher
from kd.reporting.tracking import Page, Tracker, TrackingSpec, axes, group_of, run_name, track, track_sweep
from kd.reporting.tracking.wandb import RunId, WandbPage
from kd.store import Metrics, Store
from tests.conftest import QUICK, ROOT, run_py
from tests.test_stage import TEACHER, distilled, stage
from tests.wandb_server import Server

Job = Callable[..., Any]


def test_axes_are_as_short_as_they_can_be() -> None:
    assert axes(distilled().chain) == {TEACHER.key: "teacher", distilled().key: "student"}
    seeds = [distilled(seed=s) for s in (0, 1)]
    assert list(axes(seeds).values()) == ["student-s0", "student-s1"]
    assistants = [stage(role="assistant", model=m) for m in ("resnet14", "resnet8")]
    assert list(axes(assistants).values()) == ["assistant-resnet14", "assistant-resnet8"]
    twins = [distilled(T=t) for t in (1, 2)]
    assert len(set(axes(twins).values())) == 2


def test_the_local_record(job: Job, tmp_path: Path) -> None:
    chain = job()["chain"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["role"], r["key"], r["epoch"]) for r in rows] == [
        (s["role"], s["key"], e) for s in chain for e in (1, 2)
    ]
    job(folder="again")
    assert (tmp_path / "again" / "metrics.jsonl").read_text() == ""  # a reused stage's lines are not replayed
    kept = (tmp_path / "store" / chain[1]["key"] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in kept] == [r["loss"] for r in rows if r["role"] == "student"]


def test_a_stage_that_is_trained_again_has_new_curves_and_later_steps(tmp_path: Path) -> None:
    class Recorded(Page):
        logged: ClassVar[list[tuple[str, int]]] = []
        added: ClassVar[list[str]] = []
        final: ClassVar[dict[str, Any]] = {}

        def log(self, axis: str, step: int, metrics: Metrics) -> None:
            self.logged.append((axis, step))

        def add_axis(self, axis: str) -> None:
            self.added.append(axis)

        def summarize(self, values: dict[str, Any]) -> None:
            self.final.update(values)

    teacher = stage(seed=1)
    student = distilled(guide=teacher)
    tracker = Tracker(tmp_path, [teacher, student], Recorded())
    for epoch in (1, 2):
        tracker.log(teacher, {"epoch": epoch, **({"alarms": ["it looks wrong"]} if epoch == 2 else {})})
    tracker.begin_again(teacher)
    tracker.log(teacher, {"epoch": 1})
    tracker.log(student, {"epoch": 1})
    (first, one), (_, two), (again, three), (other, four) = Recorded.logged
    assert Recorded.added == [again] == [f"{first}-again"]
    assert one < two < three < four
    assert other not in (first, again)
    assert Recorded.final == {f"{first}/alarms": ""}
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["model"], row["epoch"]) for row in rows] == [(teacher.model, 1), (student.model, 1)]


def inspect(folder: Path, *flags: str) -> str:
    """What `python -m wandb leet inspect --json` prints, from the program that it starts: that is a second faster."""
    from wandb.util import get_core_path

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    place = ["--run-file", str(file.resolve()), str(file.resolve().parents[1])]
    command = [get_core_path(), "leet", "inspect", "--no-observability", *flags, "--json", *place]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in inspect(folder).splitlines() if line.startswith("{")]


def started_of(folder: Path) -> dict[str, Any]:
    (started,) = [record["run"] for record in records(folder) if record["type"] == "run"]
    return dict(started)


def summary(folder: Path) -> dict[str, Any]:
    text = inspect(folder, "--summary")
    parsed: dict[str, Any] = json.loads(text[text.index("{") :])
    return parsed


def test_offline_run_read_back(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = job("tracking=wandb", "replicates=2", "tracking.tags=[a,b]", "tracking.group=g")
    assert "no key is configured" in capsys.readouterr().out
    written = records(tmp_path / "out")
    started = started_of(tmp_path / "out")
    config = started["config"]["update"]
    assert config["method"]["lambda"] == 0.5
    assert config["mode"] == "paper"
    assert config["stages"]["teacher"]["key"] == result["chain"][0]["key"]
    assert config["stages"]["student-s1"]["train"]["precision"] == "fp32"  # resolved, where the configuration says null
    assert config["stages"]["student-s1"]["train"]["lr"] == 0.01
    assert {started["run_group"], started["job_type"], *started["tags"]} == {"g", "kd", "a", "b"}
    history = [r["history"]["item"] for r in written if r["type"] == "history"]
    assert [row["teacher/epoch"] for row in history if "teacher/epoch" in row] == [1, 2]
    assert [row["student-s1/epoch"] for row in history if "student-s1/epoch" in row] == [1, 2]
    ended = summary(tmp_path / "out")
    assert ended["exit_code"] == 0
    assert ended["summary"]["objective"] == result["objective"]
    assert ended["summary"]["student-s0/test_acc"] == result["chain"][1]["test_acc"]


def test_a_failed_job_ends_as_failed_and_does_not_leak(job: Job, tmp_path: Path) -> None:
    jobs = ("tracking=wandb", "train.lr=1e30,0.01")
    assert len(job(*jobs, multirun=True, code=1)) == 1
    failed, fine = summary(tmp_path / "out" / "0"), summary(tmp_path / "out" / "1")
    assert (failed["exit_code"], fine["exit_code"]) == (1, 0)
    assert fine["config"]["train"]["lr"] == 0.01
    assert "student/epoch" in fine["summary"]
    assert "student/epoch" not in failed["summary"]


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


def test_online_run_reaches_the_server(server: Server, tmp_path: Path) -> None:
    mine = ("tracking=wandb", "tracking.project=mine", f"hydra.run.dir={tmp_path / 'out'}")
    done = run_py(*QUICK, *mine, cwd=tmp_path, **server.account)
    assert done.returncode == 0, done.stderr
    assert "tracking:" not in done.stdout + done.stderr  # nothing to explain
    (run,) = server.runs.values()
    assert run.fields["project"] == "mine"
    assert run.fields["displayName"] == "plane2 ← plane4 · T4 λ0.5 · s0"
    assert "groupName" not in run.fields  # a single run
    assert run.curve("student/epoch") == [1, 2]
    assert run.exits == [0]
    assert not list((tmp_path / "out").glob("wandb/offline-*"))


@pytest.mark.slow
def test_a_failure_prints_no_traceback(tmp_path: Path) -> None:
    done = run_py(*QUICK, "tracking=wandb", "train.lr=1e30", f"hydra.run.dir={tmp_path / 'out'}", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert "the loss is" in done.stderr.splitlines()[-1]
    assert summary(tmp_path / "out")["exit_code"] == 1


# online or offline ------------------------------------------------------------------------------------------------

KEY = "a" * 40
NOWHERE = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:1", "WANDB_INIT_TIMEOUT": "1"}


@pytest.fixture
def fresh_wandb() -> Iterator[None]:
    """wandb in this process reads its settings anew, and forgets them again."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.slow
def test_a_server_that_does_not_answer_means_offline(tmp_path: Path) -> None:
    """The training continues, and one line says how to send the run later."""
    done = run_py(*QUICK, "tracking=wandb", "hydra.run.dir=out", cwd=tmp_path, **NOWHERE)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("tracking: ")]
    assert re.match(
        r"tracking: offline, because W&B did not start \(.*127\.0\.0\.1:1.*\); `wandb sync .*/out/wandb/", line
    )
    assert summary(tmp_path / "out")["exit_code"] == 0


@pytest.mark.parametrize(
    ("mode", "environment"),
    [("online", {}), pytest.param("auto", {"WANDB_MODE": "online"}, marks=pytest.mark.slow)],
    ids=["override", "variable"],
)
def test_where_online_is_demanded_a_server_that_does_not_answer_is_one_line(
    tmp_path: Path, mode: str, environment: dict[str, str]
) -> None:
    mine = ("tracking=wandb", f"tracking.mode={mode}", "hydra.run.dir=out")
    done = run_py(*QUICK, *mine, cwd=tmp_path, **NOWHERE, **environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert re.match(r"tracking: W&B did not start .*; tracking\.mode=offline needs no server\n", done.stderr)
    assert "epoch" not in done.stdout  # nothing was trained


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_wandb")
def test_auto_waits_once_and_not_long_for_a_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the default timeout; the server accepts the connection and never answers."""
    monkeypatch.setattr(WandbPage, "unreachable", "")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        open_page(tmp_path / "first", "auto")
        between = time.monotonic()
        open_page(tmp_path / "second", "auto")
    assert between - began < 12
    assert time.monotonic() - between < 4
    assert capsys.readouterr().out.count("tracking: offline, because W&B did not start") == 2


def open_page(folder: Path, mode: str = "auto", method: str = "kd", multirun: str | None = None, **typed: Any) -> None:
    folder.mkdir(exist_ok=True)
    spec = TrackingSpec.model_validate({"name": "wandb", "mode": mode, **typed})
    with track(spec, folder, [distilled()], {"method": {"name": method}}, Store(folder), multirun):
        pass


@pytest.mark.usefixtures("fresh_wandb")
def test_online_without_a_key_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(KnownError, match=r"tracking: W&B did not start .*tracking\.mode=offline"):
        open_page(tmp_path, "online")


@pytest.mark.slow
def test_a_key_in_netrc_counts(server: Server, tmp_path: Path) -> None:
    """As `wandb login` writes it."""
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {server.url.removeprefix('http://')} login user password {KEY}")
    netrc.chmod(0o600)
    environment = {"NETRC": str(netrc), "WANDB_BASE_URL": server.url}
    done = run_py(*QUICK, "tracking=wandb", "hydra.run.dir=out", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    (run,) = server.runs.values()
    assert run.exits == [0]


@pytest.mark.usefixtures("fresh_wandb")
@pytest.mark.parametrize(("mode", "runs"), [("offline", 1), ("dryrun", 1), ("disabled", 0)])
def test_wandb_mode_is_respected(mode: str, runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**NOWHERE, "WANDB_MODE": mode}.items():
        monkeypatch.setenv(name, value)
    open_page(tmp_path, "auto")
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == runs


@pytest.mark.usefixtures("fresh_wandb")
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WANDB_BASE_URL", "notaurl", "wandb.base_url: .*notaurl"),
        ("WANDB_MODE", "bogus", "wandb.mode: should be 'online'.*bogus"),
        ("WANDB_API_KEY", "short", "WANDB_API_KEY invalid"),
    ],
)
def test_wrong_settings_of_wandb_are_one_line(
    tmp_path: Path, variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(KnownError, match=f"tracking: W&B's settings are wrong \\({message}") as problem:
        open_page(tmp_path, "auto")
    assert "\n" not in str(problem.value)


# variables of wandb, and names that it does not take ---------------------------------------------------------------

VARIABLES = {
    "WANDB_PROJECT": "theirs",
    "WANDB_ENTITY": "lab",
    "WANDB_NAME": "named",
    "WANDB_RUN_GROUP": "grouped",
    "WANDB_JOB_TYPE": "probe",
    "WANDB_TAGS": "a,b",
    "WANDB_NOTES": "noted",
    "WANDB_RUN_ID": "abcd1234",
    "WANDB_HOST": "node7",
}
FIELDS = ("project", "entity", "display_name", "run_group", "job_type", "tags", "notes", "run_id", "host")
DEFAULTS = ("distillation", None, "resnet8 ← resnet20 · T4 λ0.5 · s0", None, "kd", None, None)


def variables(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in {"WANDB_MODE": "offline", **values}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("fresh_wandb")
@pytest.mark.parametrize("values", [{}, dict.fromkeys(("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_GROUP"), "")])
def test_defaults_hold_where_nothing_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, str]
) -> None:
    variables(monkeypatch, **values)
    open_page(tmp_path)
    started = started_of(tmp_path)
    assert tuple(started.get(name) for name in FIELDS[:7]) == DEFAULTS
    assert not started.get("host")


@pytest.mark.usefixtures("fresh_wandb")
def test_variables_of_wandb_beat_our_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables(monkeypatch, **VARIABLES)
    open_page(tmp_path)
    started = started_of(tmp_path)
    assert [started.get(name) for name in FIELDS] == [
        *("theirs", "lab", "named", "grouped", "probe", ["a", "b"], "noted", "abcd1234", "node7")
    ]


@pytest.mark.usefixtures("fresh_wandb")
def test_typed_settings_beat_variables_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables(monkeypatch, **VARIABLES)
    open_page(tmp_path, project="mine", entity="me", group="ours", tags=["c"], multirun="three")
    started = started_of(tmp_path)
    assert [started[name] for name in ("project", "entity", "run_group", "tags")] == ["mine", "me", "ours", ["c"]]


@pytest.mark.usefixtures("fresh_wandb")
def test_wandbs_own_file_of_settings_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `wandb init` and `wandb offline` write it."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nproject = filed\nmode = offline\n")
    monkeypatch.chdir(tmp_path)
    open_page(tmp_path / "out")
    assert started_of(tmp_path / "out")["project"] == "filed"


@pytest.mark.usefixtures("fresh_wandb")
def test_wandb_dir_is_where_runs_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "runs"))
    open_page(tmp_path / "out")
    assert started_of(tmp_path / "runs")["project"] == "distillation"
    assert not (tmp_path / "out" / "wandb").exists()
    (run,) = (tmp_path / "runs" / "wandb").glob("offline-run-*")
    assert f"`wandb sync {run}` sends this run later" in capsys.readouterr().out


@pytest.mark.usefixtures("fresh_wandb")
def test_the_runs_of_a_multirun_have_ids_of_their_own_and_its_summary_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables(monkeypatch, **VARIABLES)
    open_page(tmp_path / "0", multirun="three")
    assert "tracking: WANDB_RUN_ID has no effect: a multirun has several runs\n" in capsys.readouterr().out
    job = started_of(tmp_path / "0")
    assert (job["run_id"] != "abcd1234", job["run_group"], job["display_name"]) == (True, "grouped", "named")
    track_sweep(TrackingSpec(name="wandb"), tmp_path, "three", TABLE, [])
    whole = started_of(tmp_path)
    assert (whole["run_id"] != "abcd1234", whole["run_group"]) == (True, "grouped")
    assert (whole["project"], whole["display_name"], whole["job_type"]) == ("theirs", "summary of three", "summary")


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ({"tags": [""]}, "tracking.tags: should have 1 to 64 characters for W&B (got [''])"),
        ({"tags": ["a", "t" * 70]}, "tracking.tags: should have 1 to 64 characters for W&B (got ['a', 'ttt"),
        ({"project": ""}, "tracking.project: should have 1 to 128 characters for W&B (got '')"),
        ({"project": " "}, "tracking.project: should have 1 to 128 characters for W&B (got ' ')"),
        ({"project": "kd/a#1"}, "tracking.project: should be without # / for W&B, which takes none of / \\ # ? % :"),
        ({"entity": "lab/kd"}, "tracking.entity: should be without / for W&B"),
        ({"group": "g" * 129}, "tracking.group: should have 1 to 128 characters for W&B (got 'ggg"),
    ],
)
def test_names_that_wandb_does_not_take_are_lines(typed: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError) as error:
        TrackingSpec.model_validate({"name": "wandb", **typed})
    (said,) = explain(error.value, "tracking")
    assert said.startswith(line)
    TrackingSpec.model_validate({"name": "none", **typed})  # there it is nobody's name


def test_tags_at_the_limit_are_taken() -> None:
    assert TrackingSpec(name="wandb", tags=("t" * 64, "数字")).tags == ("t" * 64, "数字")


def test_an_empty_tag_ends_the_run_before_anything_is_trained(tmp_path: Path) -> None:
    done = run_py(*QUICK, "tracking=wandb", "tracking.tags=['']", "tracking.project=a:b", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["tracking.project", "tracking.tags"]


@pytest.mark.usefixtures("fresh_wandb")
def test_names_of_ours_are_cut_to_what_wandb_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder's name may be longer, and so may the dotted path of a method."""
    variables(monkeypatch)
    open_page(tmp_path, method="package.module." + "M" * 60, multirun="g" * 200)
    started = started_of(tmp_path)
    assert started["run_group"] == "g" * 127 + "…"
    assert (len(started["job_type"]), started["job_type"][:16]) == (64, "package.module.M")
    assert capsys.readouterr().out.count(", and is cut: ") == 2


@pytest.mark.usefixtures("fresh_wandb")
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WANDB_PROJECT", "a/b", "Invalid project name 'a/b'"),
        ("WANDB_TAGS", "a,,b", "Tag at index 1 is empty"),
        ("WANDB_RUN_GROUP", "g" * 129, "at most 128 characters for run_group"),
        ("WANDB_JOB_TYPE", "j" * 65, "at most 64 characters for run_job_type"),
    ],
)
def test_variables_that_wandb_does_not_take_are_one_line(
    tmp_path: Path, variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables(monkeypatch, **{variable: value})
    with pytest.raises(KnownError, match=f"^tracking: .*{message}") as problem:
        open_page(tmp_path)
    assert "\n" not in str(problem.value)


# names ------------------------------------------------------------------------------------------------------------


def test_names_of_runs() -> None:
    assert run_name([stage(seed=31)]) == "resnet8 · s31"
    assert run_name([distilled(T=5.0, seed=31)]) == "resnet8 ← resnet20 · T5 λ0.5 · s31"
    assert run_name([distilled(T=2.5, lam=0.05, seed=s) for s in (31, 32, 33)]) == (
        "resnet8 ← resnet20 · T2.5 λ0.05 · s31–33"
    )
    teacher = stage(role="teacher", model="resnet20", loss=TeachableTeacher(T=4, weight=0.005), guide=stage())
    assert run_name([distilled(guide=teacher)]) == "resnet8 ← resnet20 ← resnet8 · T4 λ0.5 w0.005 · s0"


def test_names_of_groups() -> None:
    assert group_of(Path("multirun/2026-11-22/05-54-45-123456")) == "2026-11-22 05-54-45-123456"
    assert group_of(Path("outputs/demo")) == "demo"


# what a run comes to ----------------------------------------------------------------------------------------------


def test_the_summary_has_teacher_and_replicates_also_when_nothing_is_trained(job: Job, tmp_path: Path) -> None:
    result = job("replicates=3", "seed=5")
    job("tracking=wandb", "replicates=3", "seed=5", folder="again")
    teacher, columns = result["chain"][0], summary(tmp_path / "again")["summary"]
    assert (columns["teacher/val_acc"], columns["teacher/test_acc"]) == (teacher["val_acc"], teacher["test_acc"])
    each = {f"test_acc/s{r['seed']}": r["test_acc"] for r in result["replicates"]}
    spread = {f"test_acc/{name}": result[name] for name in ("std", "n")}
    assert (each | spread | {"test_acc": result["mean"]}).items() <= columns.items()
    assert "replicates" not in columns
    assert not list((tmp_path / "store" / "partial").glob("*/wandb.json"))  # nothing is unfinished


@pytest.mark.slow
def test_a_multirun_says_once_that_it_is_offline(tmp_path: Path) -> None:
    """In 80 columns, with a command that finds the runs of all jobs, and that of the summary."""
    jobs = ("method=scratch", "tracking=wandb", "train.lr=0.01,0.02", "train.epochs=1", "hydra.sweep.dir=sweeps/two")
    done = run_py("-m", *QUICK, *jobs, cwd=tmp_path)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    (place,) = [i for i, line in enumerate(lines) if "offline" in line and "tracking" in line]
    assert lines[place] == "tracking: offline, because no key is configured (`wandb login`); send it later:"
    assert all(len(line) <= 80 for line in lines[place : place + 2])
    assert lines[place + 1].startswith("  wandb sync sweeps/two/")
    asked = ["bash", "-c", f"ls -d {lines[place + 1].removeprefix('  wandb sync ')}"]
    found = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert len(found) == 3
    assert not [*tmp_path.rglob("run.log")]  # nothing was logged


# multiruns, and runs that go on -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_multirun_is_one_group_of_one_run_a_job(server: Server, tmp_path: Path) -> None:
    jobs = ("method=scratch", "tracking=wandb", "train.lr=0.01,1e30,0.02", "hydra.sweep.dir=sweeps/three")
    done = run_py("-m", *QUICK, *jobs, cwd=tmp_path, **server.account)
    assert done.returncode == 1
    assert "tracking:" not in done.stdout + done.stderr
    assert {run.fields["groupName"] for run in server.runs.values()} == {"three"}
    assert sorted((run.fields["jobType"], *run.exits) for run in server.runs.values()) == [
        *[("scratch", 0), ("scratch", 0), ("scratch", 1)],
        ("summary", 0),
    ]
    (table,) = [run.summary["jobs"] for run in server.runs.values() if "jobs" in run.summary]
    assert table["nrows"] == 3


@pytest.mark.slow
@pytest.mark.usefixtures("signals")
def test_an_interrupted_run_goes_on_at_the_server(server: Server, tmp_path: Path) -> None:
    """Interrupted in its student's training: one run, every epoch once."""
    mine = (*QUICK, "tracking=wandb", "runtime.checkpoint_every=1", "hydra.run.dir=out", "model.train.epochs=80")
    environment = {**os.environ, **server.account}
    with subprocess.Popen([sys.executable, str(ROOT / "run.py"), *mine], cwd=tmp_path, env=environment) as first:
        metrics = tmp_path / "out" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count('"student"') >= 3):  # a checkpoint follows its row
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        first.send_signal(signal.SIGINT)
    assert first.returncode == 130
    done = run_py(*mine, cwd=tmp_path, **server.account)
    assert "resuming after epoch" in done.stdout
    assert "Steps must be" not in done.stderr
    (run,) = server.runs.values()
    assert run.exits == [1, 0]
    assert run.curve("teacher/epoch") == [1, 2]
    assert run.curve("student/epoch") == list(range(1, 81))
    assert (
        run.summary["student/test_acc"]
        == json.loads((tmp_path / "out" / "result.json").read_text())["chain"][1]["test_acc"]
    )


@pytest.mark.slow
def test_a_failed_run_goes_on_under_its_id(job: Job, tmp_path: Path) -> None:
    """It failed before its student; what it trained is in the store."""
    job("tracking=wandb", "teacher.min_acc=100", multirun=True, folder="failed", code=1)
    job("tracking=wandb", folder="retried")
    job("tracking=wandb", folder="anew")
    started = {name: started_of(tmp_path / name) for name in ("failed/0", "retried", "anew")}
    assert started["failed/0"]["run_id"] == started["retried"]["run_id"] != started["anew"]["run_id"]
    assert started["failed/0"]["run_group"] == "failed"


def test_two_runs_at_once_have_two_ids(tmp_path: Path) -> None:
    first, second = RunId(tmp_path, "a"), RunId(tmp_path, "a")
    assert first.value != second.value
    first.release()
    again = RunId(tmp_path, "a")
    assert again.value == first.value
    again.release()
    assert RunId(tmp_path, "b").value != first.value


@pytest.mark.parametrize("text", ["", "[1]", '{"id": '])
def test_a_damaged_record_of_an_id_means_a_new_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "wandb.json").write_text(text)
    first = RunId(tmp_path, "a")
    first.release()
    assert RunId(tmp_path, "a").value == first.value


# the summary of a multirun ----------------------------------------------------------------------------------------

TABLE = [{"T": 1.0, "test": 97.5}, {"T": "auto", "failed": "the loss is nan | inf"}]


def write_figure(folder: Path) -> Path:
    path = folder / "accuracy.png"
    Image.new("RGB", (30, 20), (255, 0, 0)).save(path)
    return path


def test_a_multirun_is_summarized_in_its_group(tmp_path: Path) -> None:
    spec = TrackingSpec(name="wandb", project="p", mode="offline")
    track_sweep(spec, tmp_path, "three", TABLE, [write_figure(tmp_path)])
    started = started_of(tmp_path)
    assert (started["display_name"], started["job_type"], started["run_group"]) == (
        "summary of three",
        "summary",
        "three",
    )
    assert started["run_id"] == json.loads((tmp_path / "wandb" / "wandb.json").read_text())["id"]  # if it goes on
    logged = summary(tmp_path)["summary"]
    assert (logged["jobs"]["ncols"], logged["jobs"]["nrows"]) == (3, 2)
    assert (logged["accuracy"]["width"], logged["accuracy"]["height"]) == (30, 20)


def test_a_summary_that_cannot_be_recorded_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("wandb", "tensorboard"):
        spec = TrackingSpec.model_validate({"name": name, "project": "p", "mode": "offline"})
        track_sweep(spec, tmp_path, "three", TABLE, [tmp_path / "missing.png"])
        assert re.fullmatch(
            "tracking: the multirun's summary is not recorded: .*missing.png.*\n", capsys.readouterr().out
        )


def test_without_tracking_a_summary_writes_nothing(tmp_path: Path) -> None:
    track_sweep(TrackingSpec(name="none", project="p"), tmp_path, "three", TABLE, [])
    assert not list(tmp_path.iterdir())
