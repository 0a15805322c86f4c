"""Searches that can be continued: the same command adds the missing trials, up to `n_trials` in all.

Hydra's sweeper does not do this by itself. ready_study() prepares the study before the sweeper opens it. The sampler
draws a trial from its ordinal and the history only. hand_over() gives the job its ordinal, which names its folder. So a
search that was killed and started again ends with the same trials as an unbroken one, at equal n_jobs.
"""

from kd.app.search.processes import Locks
from kd.app.search.pruning import halving
from kd.app.search.sampler import ByTrial, ordinal
from kd.app.search.study import ORDINAL, Search, hand_over, ready_study, study_name

__all__ = ["ORDINAL", "ByTrial", "Locks", "Search", "halving", "hand_over", "ordinal", "ready_study", "study_name"]
