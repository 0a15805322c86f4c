"""The store: finished stages by key, each complete or absent. `python -m kd.store` lists, checks and cleans it."""

from kd.store.stages import RETRIED, TAUGHT_BY, Metrics, StageResult, Store, TrainedStage, alarms_in, place

__all__ = ["RETRIED", "TAUGHT_BY", "Metrics", "StageResult", "Store", "TrainedStage", "alarms_in", "place"]
