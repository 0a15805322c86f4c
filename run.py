"""The command line: Hydra composes the configuration of each job, kd/app/jobs.py does the job."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kd.app import jobs, multirun
from kd.app.command_line import read_command
from kd.app.options import register
from kd.core.spec import KnownError
from kd.reporting import console
from kd.reporting.results import Pruned, RunResult
from kd.training.checkpoint import exit_code, ignore, raise_on_sigterm
from kd.training.pipeline import follow
from kd.training.ranks import team, world


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run one job. Returns what a search maximises: the mean accuracy of its students in percent."""
    console.escape_unknown()  # of this process, which may be a launcher's
    folder = Path(HydraConfig.get().runtime.output_dir)
    return jobs.run_job(folder, lambda: _value(jobs.perform(cfg, folder), cfg), jobs.is_dry(cfg))


def _value(found: RunResult | Pruned | None, cfg: DictConfig) -> float | None:
    """What a search maximises; of a pruned trial the accuracy so far."""
    if isinstance(found, Pruned):
        return found.value
    return None if found is None else found.value(cfg.sweep.objective)


if __name__ == "__main__":
    console.escape_unknown()
    if world().rank:
        sys.exit(follow())
    raise_on_sigterm()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors, where it would print a traceback and exit
    ranks = team()
    try:
        register()
        sys.argv[1:] = read_command(sys.argv[1:])
        main()
    except KnownError as error:  # a mistake in conf/paper or on the command line: nothing has begun
        print(error, file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if (reason := jobs.why_ended(error)) is None:
            raise
        print(reason, file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        print(jobs.interrupted(sys.argv[1:]), file=sys.stderr)
        sys.exit(exit_code(interrupt))
    finally:
        ignore()  # so that the summary is printed
        failed = multirun.summarize()
        ranks.dismiss()
    sys.exit(1 if failed else 0)
