"""The command line: compose → parse → resolve data → plan → run the chain → return the objective."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from kd.app import jobs
from kd.app.command_line import read_command
from kd.app.config import initial_files, plan
from kd.app.effects import remarks
from kd.app.parsing import by_key, parse, recorded, register
from kd.core.spec import KnownError, tilde
from kd.datasets import resolve
from kd.reporting import console
from kd.reporting.results import Pruned, record_pruned, write_result
from kd.reporting.tracking import track
from kd.store import Store
from kd.training.checkpoint import exit_code, ignore, raise_on_sigterm
from kd.training.checks import check_students
from kd.training.pipeline import Pipeline, follow, run_students
from kd.training.ranks import team, world
from kd.training.workplace import Workplace


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run one job. Returns what a search maximises: the mean accuracy of its students in percent."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    dry = OmegaConf.select(cfg, "dry_run", throw_on_resolution_failure=False) is True
    return jobs.run_job(folder, lambda: _job(cfg, folder), dry)


def _job(cfg: DictConfig, folder: Path) -> float | None:
    config = parse(cfg, jobs.typed())
    dataset = resolve(config.dataset, config.data_root, config.workers, config.image_size)
    students = plan(config, dataset)
    for line in remarks(config, dataset, students[0], by_key(jobs.typed())):
        print(line, flush=True)
    store = Store(config.store_root)
    if config.dry_run:
        place = Workplace(store, config.data_root, config.runtime, initial=initial_files(config))
        check_students(place, students, config.teacher.file, networks=False)
        console.print_plan(config.mode, students, store, config.runtime.retrain)
        return None
    runtime = jobs.with_share(config.runtime)
    with track(config.tracking, folder, students, recorded(cfg, jobs.typed()), store, jobs.group()) as tracker:
        pipeline = Pipeline(
            store=store,
            data_root=config.data_root,
            runtime=runtime,
            tracker=tracker,
            checkpoint=config.teacher.file,
            initial=initial_files(config),
            on_nan=config.train.on_nan,
            min_acc=config.teacher.min_acc,
            team=team(),
            prune=jobs.pruning(config, students),
        )
        labels = {"mode": config.mode, "method": config.method.name, "dataset": config.dataset.title}
        try:
            result = run_students(pipeline, students, labels)
        except Pruned as pruned:
            tracker.summarize({"pruned_after_epoch": pruned.epoch})
            print(pruned, flush=True)
            record_pruned(folder, pruned)
            return pruned.value  # the accuracy so far
        write_result(result, folder)
        tracker.summarize(result.columns)
    console.print_run(result)
    print(tilde(f"this run: {folder}"))
    return result.value(config.sweep.objective)


if __name__ == "__main__":
    console.escape_unknown()
    if world().rank:
        sys.exit(follow())
    raise_on_sigterm()
    ranks = team()
    try:
        register()
        sys.argv[1:] = read_command(sys.argv[1:])
        main()
    except KnownError as error:  # a mistake in conf/paper or on the command line: nothing has begun
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print("interrupted: start the same command again to resume from the last checkpoint", file=sys.stderr)
        sys.exit(exit_code(interrupt))
    finally:
        ignore()  # so that the summary is printed
        failed = jobs.summarize()
        ranks.dismiss()
    sys.exit(1 if failed else 0)
