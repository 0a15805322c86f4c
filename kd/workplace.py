"""Where stages are trained: the device, the images and the guides, made alike on every rank."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kd import hardware
from kd.datasets import load
from kd.progress import Unwatched
from kd.ranks import is_lost, own_device, team, world
from kd.spec import KnownError
from kd.stage import RuntimeSpec, Source, Stage
from kd.store import Store

if TYPE_CHECKING:
    from kd.datasets.data import Data
    from kd.guide import Guide


@dataclass
class Workplace:
    """What the stages of a run share."""

    store: Store
    data_root: Path
    runtime: RuntimeSpec
    _loaded: Data | None = field(default=None, init=False)

    @cached_property
    def device(self) -> str:
        """Ready to be trained on. Raises KnownError where there is no such device."""
        device = own_device(hardware.resolve_device(self.runtime.device))
        hardware.prepare(self.threads, device)
        return device

    @property
    def threads(self) -> int:
        """By default this rank's share of the processors."""
        return self.runtime.threads or max(1, hardware.cpu_count() // world().local_size)

    def data(self, source: Source) -> Data:
        """The images of a source: loaded once for the stages of a run, which see the same."""
        if self._loaded is None or self._loaded.spec != source.dataset:
            self._loaded = load(source.dataset, self.data_root, self.device)
        return self._loaded

    def guide(self, stage: Stage) -> Guide | None:
        """What gives the logits of the finished stage below."""
        from kd.guide import Guide, open_bank

        if stage.guide is None:
            return None
        seeing = self.data(stage), stage.train.precision, self.device
        key, bank = stage.guide.key, None
        if self.runtime.bank:
            bank = open_bank(self.store.banks, key, self.store.fingerprint(key), *seeing)
        return Guide(self.store.network(key), *seeing, bank)

    def elsewhere(self) -> Workplace:
        """The same for another rank, whose working directory may be another."""
        return Workplace(Store(self.store.root.absolute()), self.data_root.absolute(), self.runtime)


def follow() -> int:
    """What every rank but the first does: its share of each stage. Says nothing but a failure of its own.

    Returns the exit code.
    """
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            _follow()
    except (KnownError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if not is_lost(error):
            raise
        return 1  # rank 0 tells
    except KeyboardInterrupt:
        return 130
    return 0


def _follow() -> None:
    from kd.train import train_stage

    for stage, place in (ranks := team()).errands():
        data, guide = place.data(stage), place.guide(stage)
        with suppress(KnownError):  # it is rank 0's too, which tells
            train_stage(stage, data, guide, place.device, Unwatched(), team=ranks)
    ranks.dismiss()
