"""Records of a run while it goes: always a local metrics.jsonl, and a page to look at when asked."""

from kd.tracking.base import TrackingSpec
from kd.tracking.names import group_of
from kd.tracking.tracker import Tracker, track, track_sweep

__all__ = ["Tracker", "TrackingSpec", "group_of", "track", "track_sweep"]
