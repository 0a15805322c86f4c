"""Pruning: successive halving by the validation accuracy of a trial's student."""

from __future__ import annotations

from collections.abc import Callable

import optuna
from hydra.core.hydra_config import HydraConfig
from optuna.pruners import SuccessiveHalvingPruner
from optuna.trial import Trial, TrialState

from kd.app.search.sampler import LOST
from kd.app.search.study import ORDINAL
from kd.reporting.results import Pruned
from kd.store import Metrics


def halving(trial: int, epochs: int) -> Callable[[Metrics], None]:
    """A function of each epoch's metrics. It raises Pruned if successive halving ends the job's trial.

    After 1/8, 1/4 and 1/2 of the epochs, a trial goes on only if it is in the better half of those that came so far.
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
