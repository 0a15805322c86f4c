"""Trials that end early: successive halving on the validation accuracy of a trial's student."""

from __future__ import annotations

from collections.abc import Callable

import optuna
from hydra.core.hydra_config import HydraConfig
from optuna.pruners import SuccessiveHalvingPruner
from optuna.trial import Trial, TrialState

from kd.pipeline import Pruned
from kd.search.sampler import LOST
from kd.search.study import ORDINAL
from kd.store import Metrics


def halving(trial: int, epochs: int) -> Callable[[Metrics], None]:
    """Takes a student's epochs, and raises Pruned where successive halving ends the job's trial.

    From an eighth of the epochs on, doubling, only the better half of the trials that came so far goes on.
    """
    sweeper = HydraConfig.get().sweeper
    pruner = SuccessiveHalvingPruner(min_resource=max(1, round(epochs / 8)), reduction_factor=2)
    study = optuna.load_study(study_name=sweeper.study_name, storage=sweeper.storage, pruner=pruner)
    running = [each for each in study.get_trials(deepcopy=False) if each.state == TrialState.RUNNING]
    (own,) = [each for each in running if each.params.get(ORDINAL) == trial and not each.user_attrs.get(LOST)]
    reported = Trial(study, own._trial_id)

    def report(metrics: Metrics) -> None:
        epoch, value = int(metrics["epoch"] or 0), float(metrics["val_acc"] or 0)
        reported.report(value, epoch)
        if epoch < epochs and reported.should_prune():
            raise Pruned(epoch, epochs, value)

    return report
