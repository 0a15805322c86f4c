"""The store: finished stages by key, each whole or absent; `python -m kd.store` keeps house."""

from kd.store.stages import Metrics, StageResult, Store, Trained, place

__all__ = ["Metrics", "StageResult", "Store", "Trained", "place"]
