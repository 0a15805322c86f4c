"""The model card: what an exported network is, what it takes and gives, how good it is, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from kd.export.base import Format
from kd.revision import commit
from kd.stage import FORMAT, Source, Stage
from kd.store import StageResult
from kd.store.listing import in_bytes
from kd.tables import SELECTED, parameters, percent, training

if TYPE_CHECKING:
    from kd.export.measures import Comparison


@dataclass(frozen=True)
class Member:
    """A network of the chain; None is what is not known of one that is not in the store."""

    source: Source
    result: StageResult | None = None
    size: int | None = None  # bytes of its weights' file
    latencies: tuple[float, ...] = ()  # milliseconds, of a batch of 1 and of 128


HEADINGS = "role", "network", "stage", "parameters", "size", "1 image, ms", "128 images, ms"


def cells(member: Member) -> tuple[str, ...]:
    """A member's line under HEADINGS."""
    unknown = "–"
    return (
        member.source.role,
        member.source.model,
        member.source.key,
        f"{member.result.params:,}" if member.result else unknown,
        in_bytes(member.size) if member.size else unknown,
        *([f"{ms:.3g}" if ms < 1000 else f"{ms:,.0f}" for ms in member.latencies] or [unknown, unknown]),
    )


def write_card(
    chain: Sequence[Member],
    form: Format,
    comparison: Comparison,
    made_with: Mapping[str, Any],
    measured: str,
    command: str,
) -> str:
    """The card of the last network of a chain, as Markdown.

    `made_with` is of its stage, `measured` says how the latencies were, `command` made the export.
    """
    exported = chain[-1]
    sections = (
        _contract(exported, form, comparison, command),
        _accuracy(exported, form, comparison),
        _origin(chain, made_with),
        f"## Size and speed\n\n{_table(HEADINGS, map(cells, chain))}\n\n{measured}\n",
    )
    return "\n".join(sections)


def _contract(exported: Member, form: Format, comparison: Comparison, command: str) -> str:
    source, data = exported.source, exported.source.dataset
    return f"""\
# {source.model} on {data.name}

A classifier of {data.num_classes} classes, stage `{source.key}`, exported by `{command}` ({_version()}).

- `images`: float32 [batch, 3, {data.image_size}, {data.image_size}], RGB in [0, 1]; the batch may have any size.
  Normalisation is inside.
- `logits`: {comparison.dtype} [batch, {data.num_classes}], in the order of the data set's classes.

```python
{form.usage}```
"""


def _accuracy(exported: Member, form: Format, comparison: Comparison) -> str:
    source, result = exported.source, exported.result
    assert result is not None  # what is exported is in the store
    stage = source if isinstance(source, Stage) else None
    lines = [
        (f"recorded, in {_precision(source)}", percent(result.val_acc), percent(result.test_acc)),
        ("original, in torch, without autocast", "", percent(comparison.original)),
        (f"exported, in {form.runtime}", "", percent(comparison.exported)),
    ]
    sample = "all" if comparison.images == comparison.of else f"{comparison.images:,} of {comparison.of:,}"
    return f"""\
## Accuracy

{_table(("", "val %", "test %"), lines)}

Choice of weights: {SELECTED[stage.train.select if stage else None]}. Exported and original were compared on {sample}
test images: their logits differ by {comparison.difference:.2g} at most, where the largest is {comparison.scale:.3g};
{comparison.agreement:.2f} % of the images get the same class.
"""


def _origin(chain: Sequence[Member], made_with: Mapping[str, Any]) -> str:
    source, data = chain[-1].source, chain[-1].source.dataset
    content = f" (content {data.content})" if data.content else ""
    held_out = (
        f"{data.val_fraction:g} of its training images, drawn by split_seed {data.split_seed}, are for validation"
    )
    return f"""\
## Origin

Data: {data.name}{content}, augmented by {data.augment}, seen by {source.normalize};
{held_out if data.val_fraction else "all of its training images train"}.

The chain, oldest first; each network was the guide of the next:

{_table(("role", "network", "stage", "loss", "seed", "val %", "test %"), map(_planned, chain))}

{"".join(f"- {_trained(member.source)}" for member in chain)}
The mode (paper or reference) is not recorded with a stage; what it decides is on this page.
Made with {", ".join(f"{name} {value}" for name, value in made_with.items())}; keys of format {FORMAT}.
"""


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *lines))


def _planned(member: Member) -> tuple[str, ...]:
    source, result = member.source, member.result
    loss, seed = "given weights", "–"
    if isinstance(source, Stage):
        loss, seed = f"{source.loss.name} {parameters(source.loss)}".strip(), str(source.seed)
    accuracies = (percent(result.val_acc), percent(result.test_acc)) if result else ("–", "–")
    return source.role, source.model, f"`{source.key}`", loss, seed, *accuracies


def _trained(source: Source) -> str:
    if not isinstance(source, Stage):
        return f"{source.role} {source.model}: given, as a file of sha256 {source.sha256}\n"
    return f"{source.role} {source.model}: {source.train.epochs} epochs, {training(source.train)}\n"


def _precision(source: Source) -> str:
    return source.train.precision if isinstance(source, Stage) else "fp32"  # as pipeline.py tests what is given


def _version() -> str:
    """The project's version, and its commit where it is a checkout."""
    try:
        named = f"kd {version('kd')}"
    except PackageNotFoundError:  # run where it lies, without being installed
        named = "kd"
    return f"{named}, commit {commit()}" if commit() else named
