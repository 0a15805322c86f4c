"""What `kd.run` and `kd.sweep` do: jobs in this process, as the command line does them, without touching the process.

argv, logging, signal handlers, the working directory, the processors that may be used, torch's settings and what the
process has of Hydra are as before when a call returns. Problems raise KnownError with a line each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import VersionBase
from omegaconf import Container, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from kd.app import jobs, multirun
from kd.app.command_line import Reader
from kd.app.experiments import CONF
from kd.app.options import register
from kd.app.parsing import by_key
from kd.core.hardware import processors_kept, settings_kept
from kd.core.spec import KnownError
from kd.reporting.console import without_comment
from kd.reporting.results import RunResult, clear_marks
from kd.training.ranks import world


def single_run(overrides: Sequence[str]) -> RunResult:
    """The result of one run, which is trained, or loaded from the store."""
    with _called("kd.run"):
        cfg = _composed(_read(overrides, "kd.run"))
        _refuse_plan(cfg)
        folder = Path(cfg.hydra.run.dir).absolute()
        config = _entered(cfg, folder)
        try:
            clear_marks(folder, dry=False)
            found = jobs.perform(config, folder)
        except Exception as error:
            reason = jobs.noted(folder, error)
            if isinstance(error, KnownError) or reason is None:
                raise
            raise KnownError(reason) from error
        assert isinstance(found, RunResult)  # only a search prunes, and only a dry run has nothing
        return found


def grid(overrides: Sequence[str]) -> Path:
    """Do the jobs of a grid one after another. Returns its folder, with the same files as a multirun's."""
    with _called("kd.sweep"):
        words = _read(overrides, "kd.sweep")
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        combinations = BasicSweeper.split_arguments(parser.parse_overrides(words), None)[0]
        first = _composed(combinations[0])
        _refuse_plan(first)
        _refuse_plugins(first)
        folder = Path(first.hydra.sweep.dir).absolute()
        with open_dict(first):
            first.hydra.overrides.task = words
        _save(folder, {"multirun": first})
        if "hydra.sweep.subdir" in by_key(words):
            print("hydra.sweep.subdir has no effect: kd.sweep names the folders of jobs by their numbers", flush=True)
        multirun.Multirun.start = multirun.start_of(first)
        multirun.Multirun.begin(folder, len(combinations))
        try:
            for number, combination in enumerate(combinations):
                print(f"job {number} of {len(combinations)}: {' '.join(combination)}", flush=True)
                _job(combination, folder, number)
        finally:
            multirun.summarize()
            multirun.Multirun.folder = None
    return folder


def _job(overrides: Sequence[str], folder: Path, number: int) -> None:
    """One job of a grid. If it fails, its folder says why, and the grid goes on."""
    cfg = _composed(overrides)
    with open_dict(cfg):
        cfg.hydra.mode, cfg.hydra.sweep.dir, cfg.hydra.job.num = RunMode.MULTIRUN, str(folder), number
    place = folder / str(number)
    config = _entered(cfg, place)
    jobs.run_job(place, lambda: jobs.perform(config, place), dry=False)


def _read(words: Sequence[str], call: str) -> list[str]:
    """The overrides that the function `call` is given, for Hydra, as the command line reads them."""
    if isinstance(words, str):
        raise KnownError(f"{call}: takes a list: {call}([{words!r}])")
    if flags := [word for word in words if word.startswith("-")]:
        raise KnownError(f"{call}: takes key=value; {' '.join(flags)} is for the command line")
    if "hydra.mode" in by_key(words):
        raise KnownError("hydra.mode: kd.run does one run, kd.sweep several")
    args = get_args_parser().parse_args(["-m"] if call == "kd.sweep" else [])
    return Reader(args, call).read(without_comment(words))


def _composed(overrides: Sequence[str]) -> DictConfig:
    return compose("config", [*overrides], return_hydra_config=True)


def _entered(cfg: DictConfig, folder: Path) -> DictConfig:
    """The configuration of a job without Hydra's part, saved in the job's folder as Hydra does."""
    if cfg.hydra.mode is None:
        cfg.hydra.mode = RunMode.RUN
    config = cfg.copy()
    with open_dict(config):
        del config["hydra"]
    _save(folder, {".hydra/config": config, ".hydra/overrides": cfg.hydra.overrides.task})
    HydraConfig.instance().set_config(cfg)
    return config


def _save(folder: Path, nodes: Mapping[str, Container]) -> None:
    """Write <name>.yaml for each node, as Hydra does."""
    try:
        for name, node in nodes.items():
            path = folder / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(node, path)
    except OSError as error:
        raise KnownError(f"{folder} cannot be written ({error.strerror})") from error


def _refuse_plan(cfg: DictConfig) -> None:
    if jobs.is_dry(cfg):
        raise KnownError("dry_run and why print, and have no result to return: python run.py … dry_run=true")


def _refuse_plugins(cfg: DictConfig) -> None:
    basic = all(cfg.hydra[part]["_target_"].endswith(f".Basic{part.title()}") for part in ("sweeper", "launcher"))
    if not basic or cfg.hydra.sweeper.get("params"):
        raise KnownError(
            "kd.sweep does the jobs of a grid one after another; searches and launchers need the command line: "
            "python run.py -m …, and then kd.results(folder)"
        )


@contextmanager
def _called(name: str) -> Iterator[None]:
    """Hydra with conf/, in place of what this process has of it. Hydra's errors become KnownErrors."""
    if world().size > 1:
        raise KnownError(f"{name}: under torchrun use run.py, which knows of the other processes")
    version, own = VersionBase.instance(), HydraConfig.instance()
    before = GlobalHydra.instance().hydra, own.cfg, version.version_base
    GlobalHydra.instance().clear()
    try:
        jobs.say_once.cache_clear()  # another call may do its jobs in the same folder
        with processors_kept():
            register()
            with settings_kept(), initialize_config_dir(str(CONF), version_base="1.3"):
                yield
    except (HydraException, OmegaConfBaseException) as error:
        raise KnownError(str(error)) from error
    finally:
        GlobalHydra.instance().hydra, own.cfg, version.version_base = before
