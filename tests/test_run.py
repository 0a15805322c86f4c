"""run.py as people use it: results, reuse, sweeps, failures and their exit codes."""

from __future__ import annotations

import io
import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from kd.app.jobs import known_reason
from kd.core.spec import KnownError, NonFiniteError
from kd.core.stage import Stage
from kd.core.statistics import spread
from kd.methods import METHODS
from kd.reporting import console, results
from kd.reporting.results import RunResult
from kd.store import Store, TrainedStage
from tests.conftest import QUICK, run_py
from tests.test_datasets import write_folder
from tests.test_stage import distilled, stage

Job = Callable[..., Any]


def test_result_json(job: Job) -> None:
    result = job()
    assert set(result) == {"chain", "objective", "mode", "method", "dataset", "classes", "baseline"}
    teacher, student = result["chain"]
    promised = {"role", "model", "key", "params", "val_acc", "test_acc", "epochs", "seconds", "reused"}
    assert set(student) == promised | {"select", "seed", "loss", "guides", "normalize", "evidence", "alarms"}
    usual = {"reduction": "batchmean", "weight": 1.0, "standardize": False}
    assert student["loss"] == {"name": "distill", "T": 4.0, "lambda": 0.5, **usual}
    assert (teacher["role"], student["role"]) == ("teacher", "student")
    assert result["objective"] == student["val_acc"]
    assert 10 < student["test_acc"] <= 100
    assert re.fullmatch("[0-9a-f]{16}", student["key"])


def test_a_second_run_trains_nothing_and_says_the_same(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    first = job()
    capsys.readouterr()
    second = job(folder="second")
    assert [s.pop("reused") for s in first["chain"]] == [False, False]
    assert [s.pop("reused") for s in second["chain"]] == [True, True]
    assert first == second
    printed = capsys.readouterr().out
    assert "trained" not in printed
    assert f'kd.load("{first["chain"][1]["key"]}")' in printed


def test_cold_and_warm_stores_end_in_the_same_bits(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's file is the same with a new teacher and with a stored one."""
    job("method.T=7", folder="teacher")  # leaves the teacher
    warm = job(folder="warm")
    monkeypatch.setenv("KD_STORE", str(tmp_path / "other"))
    cold = job(folder="cold")
    assert [s["reused"] for s in warm["chain"]] == [True, False]
    assert [s["reused"] for s in cold["chain"]] == [False, False]
    for cold_stage in cold["chain"]:
        for file in ("model.safetensors", "metrics.jsonl"):
            one, other = ((tmp_path / store / cold_stage["key"] / file).read_bytes() for store in ("store", "other"))
            assert one == other


def test_retrain_trains_again_and_ends_in_the_same_bits(job: Job, tmp_path: Path) -> None:
    key = job()["chain"][1]["key"]
    before = (tmp_path / "store" / key / "model.safetensors").read_bytes()
    again = job("runtime.retrain=true", "replicates=2", folder="again")
    assert [s["reused"] for s in again["chain"]] == [False, False]
    assert (tmp_path / "store" / key / "model.safetensors").read_bytes() == before
    rows = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["role"] == "teacher" for row in rows) == 2  # once for both replicates


def test_replicates(job: Job) -> None:
    result = job("replicates=3", "seed=5")
    accuracies = [r["test_acc"] for r in result["replicates"]]
    assert [r["seed"] for r in result["replicates"]] == [5, 6, 7]
    assert len({r["key"] for r in result["replicates"]}) == 3
    assert result["chain"][-1]["key"] == result["replicates"][0]["key"]
    assert result["n"] == 3
    assert result["mean"] == pytest.approx(sum(accuracies) / 3, abs=1e-3)
    assert result["ci95"][0] <= result["mean"] <= result["ci95"][1]
    assert result["objective"] == pytest.approx(sum(r["val_acc"] for r in result["replicates"]) / 3, abs=1e-3)


def test_the_t_interval_by_hand() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert (found.mean, found.std, found.n) == (2.0, 1.0, 3)
    half = 4.302652729911275 / 3**0.5  # Student's t at .975 with two degrees of freedom
    assert found.ci95 == pytest.approx((2 - half, 2 + half), abs=1e-4)


QUICK_ONES = ("scratch", "kd", "ta", "trained_teacher")


def test_without_a_validation_split_there_is_no_objective(job: Job) -> None:
    result = job("dataset.val_fraction=0", "train.select=last")
    assert result["objective"] is None
    assert result["chain"][0]["val_acc"] is None


@pytest.mark.parametrize(
    "method", [name if name in QUICK_ONES else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_each_method_runs(job: Job, method: str) -> None:
    extra = ["method.assistants=[plane4]"] if method == "ta" else []
    roles = [s["role"] for s in job(f"method={method}", *extra)["chain"]]
    middle = {
        "scratch": [],
        "kd": ["teacher"],
        "ta": ["teacher", "assistant"],
        "trained_teacher": ["reference", "teacher"],
    }
    assert roles == [*middle.get(method, roles[:-1]), "student"]  # of a method that is added, the student alone


def test_the_plans_of_a_sweep_name_their_jobs(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job("method=scratch", "seed=0,1", "dry_run=true", multirun=True)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("job ")]
    assert said == ["job 0: seed=0", "job 1: seed=1"]


def test_a_sweep_trains_what_jobs_share_once(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = ("method=kd,ta", "seed=0,1", "method.T=1,5", "model=plane2", "teacher=plane2", "train.epochs=1")
    results = job(*jobs, "method.assistants=[plane4]", multirun=True)
    assert len(results) == 8
    trained = [s["key"] for r in results for s in r["chain"] if not s["reused"]]
    assert len(trained) == len(set(trained)) == 1 + 1 + 8  # one teacher, one assistant, eight students
    assert {(s["role"], s["model"]) for r in results for s in r["chain"]} == {
        ("teacher", "plane2"),
        ("assistant", "plane4"),
        ("student", "plane2"),
    }


def test_the_four_methods_need_no_other_change(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    each = "method=scratch,kd,ta,trained_teacher"
    assert command("-m", each, "dry_run=true", f"hydra.sweep.dir={tmp_path / 'out'}") == 0
    assert capsys.readouterr().out.count("stages to train") == 4


def test_dry_run_and_help_answer_at_once(tmp_path: Path) -> None:
    """Under two seconds, or three seconds of CPU time on a busy machine; the best of three."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    for command in (["--help"], ["dry_run=true", "method=ta", "hydra.run.dir=out"]):
        seconds = []
        for _ in range(3):
            before = used()
            done = run_py(*command, cwd=tmp_path)
            seconds.append(used() - before)
            assert done.returncode == 0, done.stderr
            if seconds[-1] < 3:
                break
        assert min(seconds) < 3, command
    assert "resnet14" in done.stdout
    assert "3 of 3 stages to train" in done.stdout
    assert "teacher resnet20, assistant resnet14, student resnet8: sgd momentum 0.9 (Nesterov), lr 0.05" in done.stdout
    assert not (tmp_path / "store").exists()


def test_dry_run_tells_what_is_there(
    job: Job, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [s["key"] for s in job()["chain"]]
    dry = (*QUICK, "dry_run=true", f"hydra.run.dir={tmp_path / 'dry'}")
    assert command(*dry, "method.T=9") == 0
    told = capsys.readouterr().out
    assert "1 of 2 stages to train" in told
    assert re.search(f"{keys[0]}.*stored", told)
    assert command(*dry, "runtime.retrain=true") == 0
    assert "2 of 2 stages to train" in capsys.readouterr().out


# failures ---------------------------------------------------------------------------------------------------------


def test_a_bad_value_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run_py("method.lambda=1.5", "seed=-1", "hydra.run.dir=out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "method.lambda: should be at most 1 (got 1.5)",
        "seed: should be at least 0 (got -1)",
    ]
    assert done.stdout == ""


def test_a_failing_job_does_not_stop_the_sweep(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    job("method=scratch", "train.lr=0.01,1e30,-1,0.02", multirun=True, folder="sweep", code=1)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    finished = {p.parent.name for p in tmp_path.glob("sweep/*/result.json")}
    failed = {p.parent.name: json.loads(p.read_text())["error"] for p in tmp_path.glob("sweep/*/error.json")}
    assert finished == {"0", "3"}
    assert failed.keys() == {"1", "2"}
    assert re.match(r"student plane2: the loss is (nan|inf)", failed["1"][0])
    assert failed["2"] == ["train.lr: should be above 0 (got -1)"]
    summary = out[out.rindex("4 jobs") :]
    assert re.match(r"4 jobs, .* all with .*method=scratch", " ".join(summary.partition("─")[0].split()))
    assert re.search(r"job 1 \(.*lr=1e\+?30.*\): student plane2: the loss is", summary)
    assert re.search(r"job 2 \(.*\): train.lr: should be above 0", summary)
    left = {path.name for path in (tmp_path / "store").iterdir()} - {".locks", "partial"}
    assert left == {json.loads((tmp_path / f"sweep/{n}/result.json").read_text())["chain"][0]["key"] for n in (0, 3)}


def test_a_failed_stage_is_not_in_the_store(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job("method=scratch", "train.lr=1e30", code=2)
    told = capsys.readouterr().err
    assert re.fullmatch(r"student plane2: the loss is \w+ at epoch 1, step \d+, learning rate 1e\+30; .*\n", told)
    assert not list((tmp_path / "store").glob("[0-9a-f]*"))
    (row,) = results.student_rows(results.find_jobs(tmp_path / "out"))
    assert row["failure"] == told.strip()  # not "unfinished": nobody could finish it


def test_an_unfinished_job_counts(job: Job, tmp_path: Path) -> None:
    job("seed=0,1", multirun=True, folder="sweep")
    (tmp_path / "sweep" / "1" / "result.json").unlink()
    found = results.find_jobs(tmp_path / "sweep")
    assert [(j.number, j.result is None, j.reason) for j in found] == [("0", False, ""), ("1", True, "unfinished")]
    row = results.student_rows(found)[-1]
    again = "python run.py model=plane2 teacher=plane4 train.epochs=2 "
    assert row["failure"].startswith(f"unfinished: {again}")
    assert row["failure"].endswith(" seed=1 goes on with it")
    trial = found[1]._replace(overrides=["runtime.trial=3"])
    assert results.student_rows([trial])[0]["failure"] == "unfinished: the command of its search goes on with it"


def test_a_student_too_deep_for_its_images_fails_before_its_teacher_is_trained(
    tmp_path: Path, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / "tiny" / part / name).mkdir(parents=True)
            for i in range(20):
                Image.new("RGB", (8, 8), (i, i, 60 * (name == "a"))).save(tmp_path / "tiny" / part / name / f"{i}.png")
    job("dataset=folder", f"dataset.root={tmp_path / 'tiny'}", "train=cifar10", "model=plane10", code=2)
    wide = "plane10 halves its input 4 times: images should be at least 16 pixels wide (got 8)"
    assert wide in capsys.readouterr().err
    assert not list((tmp_path / "store").glob("[0-9a-f]*"))


# reports ----------------------------------------------------------------------------------------------------------


def test_a_protocol_that_looks_at_the_test_set_is_printed_as_such(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job("train.select=best_test")
    assert "EPOCH CHOSEN ON THE TEST SET" in capsys.readouterr().out


def test_every_stage_that_looked_at_the_test_set_is_named(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job("teacher.train.select=best_test")
    assert "teacher plane4: EPOCH CHOSEN ON THE TEST SET" in capsys.readouterr().out


def test_tables_fit_80_columns(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    result = job()
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(console, "console", lambda: screen)
    chain = [{**result["chain"][0], "model": "resnet20", "params": 272_474, "val_acc": 100.0, "seconds": 4321.0}]
    console.print_run(RunResult.model_validate({**result, "chain": chain}), "kd.load(…)")
    planned = [stage(role="assistant", model="resnet110"), distilled()]
    console.print_plan("digits, mode paper", planned, Store(Path("nowhere")), False)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 80
    row = next(line for line in shown.splitlines() if "resnet20 " in line)
    assert row.split() == [
        "teacher",
        "resnet20",
        "272,474",
        chain[0]["key"],
        "100.00",
        f"{chain[0]['test_acc']:.2f}",
        *row.split()[-3:],
    ]
    assert f"assistant resnet110 0 cross_entropy 2 {planned[0].key} to train" in " ".join(shown.split())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hydra.sweep.subdir=deep/${hydra.job.num}", "hydra.output_subdir=null"])
def test_failures_are_found_wherever_the_jobs_folders_are(job: Job, tmp_path: Path, layout: str) -> None:
    job("method=scratch", "train.lr=-1,0.01", layout, multirun=True, code=1)
    assert len(list((tmp_path / "out").rglob("error.json"))) == len(list((tmp_path / "out").rglob("result.json"))) == 1


@pytest.mark.slow
def test_jobs_that_left_nothing_count(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Like a worker that is killed before its job begins."""
    from kd.app.multirun import Multirun, summarize

    job("seed=0,1", "train.epochs=1,2", multirun=True)
    assert Multirun.expected == 4
    for number in "13":
        shutil.rmtree(tmp_path / "out" / number)
    capsys.readouterr()
    assert summarize() == 2
    line = "2 of 4 jobs left no folder: killed, or never started"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "out" / "summary.md").read_text()


def test_jobs_are_sorted_as_numbers(tmp_path: Path) -> None:
    for number in ("10", "2", "1"):
        (tmp_path / number).mkdir()
        results.record_failed(tmp_path / number, "no")
    assert [found.number for found in results.find_jobs(tmp_path)] == ["1", "2", "10"]


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"chain": 3}'])
def test_a_foreign_result_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(KnownError, match="is not the result of a run"):
        results.read_result(tmp_path / "result.json")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("runtime.device=cuda:99",), "runtime.device: torch sees"),
        (("runtime.store=/proc/no",), "/proc/no"),
        (("dataset=folder", "dataset.root=pets", "runtime.data=/proc/no"), "/proc/no"),
        (("dataset=folder", "dataset.root='~nobody-at-all/x'"), "does not exist"),
        (("dataset.val_fraction=0.003",), "leaves 1437 training and 0 validation images"),
        (("dataset.val_fraction=0.999",), "leaves 0 training"),
    ],
)
def test_what_only_shows_later_is_one_line_too(
    job: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: tuple[str, ...],
    message: str,
) -> None:
    write_folder(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    job(*overrides, code=2)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1, printed
    assert message in printed


def test_a_store_among_the_jobs_is_no_job(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job("method=scratch", "seed=0,1", f"runtime.store={tmp_path / 'out' / 'store'}", multirun=True)
    assert "2 jobs, mode paper, all with" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_dry_run_leaves_results_and_fails_as_others_do(job: Job, tmp_path: Path) -> None:
    before = job()
    assert job("dry_run=true") == before
    job("dry_run=true", "seed=0,-1", multirun=True, folder="dry", code=1)
    job("dry_run=true", "seed=0,1", multirun=True, folder="fine")


def test_a_loss_that_is_not_finite_may_be_tried_in_fp32(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import kd.training.loop

    really = kd.training.loop.train_stage

    def train_stage(stage: Stage, **rest: Any) -> Any:
        trained = really(stage, **rest)
        if stage.train.precision == "bf16":
            raise NonFiniteError("the loss is nan")
        return trained

    monkeypatch.setattr(kd.training.loop, "train_stage", train_stage)
    common = ("method=scratch", "train.precision=bf16")
    job(*common, code=2)
    result = job(*common, "train.on_nan=retry_fp32")
    assert "the loss is nan; train.on_nan=retry_fp32: training it again in fp32" in capsys.readouterr().out
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == [1, 2]  # of the second attempt alone
    assert Store(tmp_path / "store").precision(result["chain"][0]["key"]) == "fp32"
    retried = load_file(tmp_path / "store" / result["chain"][0]["key"] / "model.safetensors")
    exact = job("method=scratch")["chain"][0]["key"]
    assert exact != result["chain"][0]["key"]
    for name, tensor in load_file(tmp_path / "store" / exact / "model.safetensors").items():
        assert tensor.equal(retried[name])
    job(*common, code=2)
    assert "was trained in fp32 after the loss is nan; train.on_nan=retry_fp32 accepts it" in capsys.readouterr().err
    assert job(*common, "train.on_nan=retry_fp32")["chain"][0]["reused"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3.6 TiB"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_too_little_memory_is_one_line(error: Exception) -> None:
    reason = known_reason(error)
    assert reason is not None
    assert reason.startswith("out of memory (")
    assert "\n" not in reason
    assert known_reason(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.slow
def test_a_retraining_goes_on_too(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kd.reporting.console import StageProgress

    def interrupt(self: StageProgress, metrics: Any) -> None:
        raise KeyboardInterrupt

    job("method=scratch")
    with monkeypatch.context() as patched:
        patched.setattr(StageProgress, "epoch_ended", interrupt)
        job("method=scratch", "runtime.retrain=true", code=130)
    job("method=scratch")  # who reuses the stage leaves it alone
    assert not job("method=scratch", "runtime.retrain=true")["chain"][0]["reused"]
    assert "resuming after epoch 1" in capsys.readouterr().out


@pytest.mark.parametrize(("multirun", "key"), [((), "run"), (("-m",), "sweep")])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, multirun: tuple[str, ...], key: str) -> None:
    (tmp_path / "taken").touch()
    done = run_py(*multirun, *QUICK, f"hydra.{key}.dir=taken/out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"hydra.{key}.dir: taken/out cannot be written (Not a directory)\n"


def test_a_student_of_earlier_weights_of_its_teacher_is_told(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student = job("method=kd")["chain"]
    job("method=kd")
    assert "earlier weights" not in capsys.readouterr().out
    store = Store(tmp_path / "store")
    state = {
        name: tensor * 1.01 if tensor.is_floating_point() else tensor
        for name, tensor in store.network(teacher["key"]).network.state_dict().items()
    }
    again = TrainedStage(state, store.metrics(teacher["key"]), store.result(teacher["key"]))
    store.save(store.source(teacher["key"]), again, store.record(teacher["key"])["made_with"])  # as by another machine
    job("method=kd")
    line = f"student plane2 ({student['key']}) was taught by earlier weights of plane4, which was trained again later; "
    assert capsys.readouterr().out.count(line) == 1
    job("method=kd", "runtime.retrain=true")
    job("method=kd")
    assert "earlier weights" not in capsys.readouterr().out
