"""Knowledge distillation in stages: each network is trained once, and stored by a key.

In Python: `kd.run`, `kd.sweep`, `kd.results` and `kd.load`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from torch import Tensor

    from kd.models.normalization import Normalized
    from kd.reporting.results import RunResult


def run(overrides: Sequence[str] = ()) -> RunResult:
    """What `python run.py <overrides>` does, in this process: `kd.run(["model=resnet8", "method=kd"])`.

    Returns what result.json has. Stages that are in the store are loaded. The files go to outputs/<date>/<time>/ below
    the working directory, or to hydra.run.dir. Raises kd.core.spec.KnownError with all problems, one per line.
    """
    from kd.app.calls import single_run

    return single_run(overrides)


def sweep(overrides: Sequence[str]) -> list[dict[str, Any]]:
    """What `python run.py -m <overrides>` does, in this process, one job after another.

    `pandas.DataFrame(kd.sweep(["method=scratch,kd", "seed=0,1,2"]))` is a table. Returns the rows of kd.results(). A
    job that fails has a row with the reason. The files go to multirun/<date>/<time>/, or to hydra.sweep.dir. Raises
    KnownError as above. Searches and launchers need the command line.
    """
    from kd.app.calls import grid

    return results(grid(overrides))


def results(folder: str | Path) -> list[dict[str, Any]]:
    """A row for each student of the runs below a folder: multirun/<date>/<time>/, a run's own folder, or outputs/.

    A row has the job, what was set for it, the student's seed, its chain, accuracies in percent and key, and the
    number of alarms of its chain. A job without a result has one row, with the reason. Raises KnownError if there is no
    such folder.
    """
    from kd.core.spec import KnownError
    from kd.reporting.results import find_jobs, student_rows

    if not Path(folder).is_dir():
        raise KnownError(f"{folder} is not a folder; a sweep's is multirun/<date>/<time>, a run's outputs/…")
    return student_rows(find_jobs(Path(folder)))


@overload
def load(key: str, store: str | Path | None = None) -> Normalized: ...


@overload
def load(key: str, store: str | Path | None = None, *, images: Sequence[str | Path]) -> tuple[Normalized, Tensor]: ...


def load(
    key: str, store: str | Path | None = None, *, images: Sequence[str | Path] | None = None
) -> Normalized | tuple[Normalized, Tensor]:
    """A finished stage's network in eval mode, on the CPU, with its normalisation inside.

    `key` may be a beginning of the key that is unique. The network takes RGB images [batch, 3, height, width], uint8 or
    floating in [0, 1], and gives logits [batch, class] in the order of its data set's classes. Images should be squares
    as its test images were, of `dataset.image_size` pixels. A network that needs another size resizes them.

    With `images`, the paths of picture files, it also returns these pictures prepared as its test images were: uint8
    [picture, 3, height, width]. `network, batch = kd.load(key, images=["cat.jpg"])`, then `network(batch)`.

    `store` is the path of the store, by default the one in the repository (or $KD_STORE). Raises
    kd.core.spec.KnownError if there is no such stage, if it is damaged, or if a picture cannot be read.
    """
    from kd.store import Store

    known = Store.at(store)
    network = known.network(whole := known.complete(key))
    if images is None:
        return network
    from kd.tools.predict import batch_of

    return network, batch_of(known.source(whole), [Path(image) for image in images])
