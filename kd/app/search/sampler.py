"""The sampler: a trial's parameters depend only on its ordinal and the history."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from hydra.errors import CompactHydraException
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

LOST = "lost"  # a trial's attribute: its process ended before the trial did
AGAIN = "again"  # the value of LOST since a retry has its trial's ordinal, as its own attribute of this name
WANTED = "n_trials"  # a study's attribute: the number of trials in all
NO_BEST = "every trial has failed, so there is no best one"


class ByTrial(BaseSampler):
    """TPE with a new random seed for each trial, from (seed, ordinal). Earlier draws of the process do not matter."""

    def __init__(self, seed: int, n_startup_trials: int) -> None:
        self._seed, self._n_startup_trials = seed, n_startup_trials
        self._number, self._tpe = -1, TPESampler()

    def _of(self, study: Study, trial: FrozenTrial) -> TPESampler:
        if trial.number != self._number:
            self._number = trial.number
            seed = hashlib.sha256(f"{self._seed} {ordinal(study, trial.number)}".encode()).digest()
            self._tpe = TPESampler(
                seed=int.from_bytes(seed[:4], "big"),
                n_startup_trials=self._n_startup_trials,
                warn_independent_sampling=False,
            )
        return self._tpe

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As TPE does."""
        return self._of(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As TPE does."""
        return self._of(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As TPE does."""
        return self._of(study, trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """If all trials have failed, end the search in one line. The sweeper would ask for the best trial and crash."""
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        open_ = [other for other in others if not other.state.is_finished()]
        succeeded = state == TrialState.COMPLETE or any(other.state == TrialState.COMPLETE for other in others)
        if not (open_ or succeeded) and len(others) + 1 >= study.user_attrs.get(WANTED, 0):
            raise CompactHydraException(f"study {study.study_name}: {NO_BEST}")


def ordinal(study: Study, number: int) -> int:
    """The trial's number in the search. A lost trial is started again: the retry has its number, and does not count."""
    before = [trial.user_attrs for trial in study.get_trials(deepcopy=False) if trial.number <= number]
    if AGAIN in before[number]:
        return int(before[number][AGAIN])
    # In a study of an earlier version the lost trials do not count, and their retries do.
    return number - len([attrs for attrs in before[:number] if AGAIN in attrs or attrs.get(LOST) is True])
