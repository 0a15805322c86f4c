"""Searches: studies that go on where they were left, up to `n_trials` in all however often they stop.

Hydra's sweeper knows nothing of this. prepare() readies the study before the sweeper opens it, the sampler draws a
trial from its ordinal and the history alone, and hand_over() tells the job its ordinal, which its folder is named
after. So a search that was killed and started again ends with the trials of an unbroken one, at equal n_jobs.
"""

from kd.search.locks import Locks
from kd.search.pruning import halving
from kd.search.sampler import ByTrial, ordinal
from kd.search.study import ORDINAL, Search, hand_over, prepare, study_name

__all__ = ["ORDINAL", "ByTrial", "Locks", "Search", "halving", "hand_over", "ordinal", "prepare", "study_name"]
