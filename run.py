"""The one entry: compose → parse → resolve data → plan → run the chain → return the objective."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from kd import job, records, sweep, tables
from kd.config import plan
from kd.datasets import resolve
from kd.parsing import parse, recorded
from kd.pipeline import Pipeline, Pruned, run, write_result
from kd.ranks import team, world
from kd.signals import exit_code, ignore, raise_on_sigterm
from kd.spec import tilde
from kd.store import Store
from kd.tracking import track
from kd.workplace import follow


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """One job: the mean accuracy of its students in percent, on validation, which a search maximises."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    dry = OmegaConf.select(cfg, "dry_run", throw_on_resolution_failure=False) is True
    return job.job(folder, lambda: _job(cfg, folder), dry)


def _job(cfg: DictConfig, folder: Path) -> float | None:
    config = parse(cfg)
    dataset = resolve(config.dataset, config.data_root, config.workers)
    students = plan(config, dataset)
    store = Store(config.store_root)
    if config.dry_run:
        tables.print_plan(config.mode, students, store, config.runtime.retrain)
        return None
    runtime = job.share(config.runtime)
    with track(config.tracking, folder, students, recorded(cfg), store, job.group()) as tracker:
        teacher = config.teacher
        prune = job.pruning(config, students)
        shared = store, config.data_root, runtime
        pipeline = Pipeline(*shared, tracker, teacher.file, config.train.on_nan, teacher.min_acc, team(), prune)
        labels = {"mode": config.mode, "method": config.method.name, "dataset": config.dataset.title}
        try:
            result = run(pipeline, students, labels)
        except Pruned as pruned:
            tracker.summarize({"pruned_after_epoch": pruned.epoch})
            print(pruned, flush=True)
            records.record_pruned(folder, pruned)
            return pruned.value  # what it had reached
        write_result(result, folder)
        tracker.summarize(result.columns)
    tables.print_run(result)
    print(tilde(f"this run: {folder}"))
    return result.value(config.sweep.objective)


if __name__ == "__main__":
    if world().rank:
        sys.exit(follow())
    raise_on_sigterm()
    ranks = team()
    try:
        main()
    except KeyboardInterrupt as interrupt:
        print(
            "interrupted: the same command goes on after the finished stages and the last checkpoint", file=sys.stderr
        )
        sys.exit(exit_code(interrupt))
    finally:
        ignore()  # whoever asks again is told how it ended first
        failed = sweep.summarize()
        ranks.dismiss()
    sys.exit(1 if failed else 0)
