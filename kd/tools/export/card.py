"""The model card: what an exported network is, its inputs and outputs, its accuracy, and its origin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from kd.core.files import commit
from kd.core.stage import FORMAT, DatasetSpec, Source, Stage
from kd.reporting.console import in_bytes, percent, training
from kd.reporting.results import SELECTED
from kd.store import StageResult
from kd.tools.export.contract import Contract
from kd.tools.export.formats import Format

if TYPE_CHECKING:
    from kd.tools.export.comparison import Comparison


@dataclass(frozen=True)
class Member:
    """A network of the chain. The other fields are None if it is no longer in the store."""

    source: Source
    result: StageResult | None = None
    precision: str | None = None  # in which it was evaluated
    size: int | None = None  # bytes of its stored weights


def write_card(
    chain: Sequence[Member],
    form: Format,
    comparison: Comparison,
    *,
    size: int,
    made_with: Mapping[str, Any],
    command: str,
) -> str:
    """The card of the last network of a chain, as Markdown.

    `size` is the exported weights' in bytes, `made_with` is recorded with the stage, `command` made the export.
    """
    exported = chain[-1]
    sections = (
        _contract(exported.source, form, comparison, size, command),
        _accuracy(exported, form, comparison),
        _origin(chain, made_with),
    )
    return "\n".join(sections)


def _contract(source: Source, form: Format, comparison: Comparison, size: int, command: str) -> str:
    contract = Contract.of(source)
    names = f"these classes: {contract.shown_classes}" if contract.classes else "the data set's classes"
    return f"""\
# {source.model} on {contract.dataset}

A classifier of {contract.num_classes} classes, stage `{source.key}`, exported by `{command}` ({_version()}).

- `images`: {contract.images}. The batch may have any size.
- How a picture becomes an image: {contract.preprocessing}.
  `python -m kd.predict <this folder> <picture>` does it.
- Inside the network: normalisation, {contract.inside}.
- `logits`: {comparison.dtype} [batch, {contract.num_classes}], in the order of {names}.
- `{form.weights}`: {in_bytes(size)}.

```python
{form.usage}```
"""


def _accuracy(exported: Member, form: Format, comparison: Comparison) -> str:
    source, result = exported.source, exported.result
    assert result is not None  # the exported network is in the store
    stage = source if isinstance(source, Stage) else None
    lines = [
        (f"recorded, in {exported.precision}", percent(result.val_acc), percent(result.test_acc)),
        ("original, in torch, without autocast", "", percent(comparison.original)),
        (f"exported, in {form.runtime}", "", percent(comparison.exported)),
    ]
    sample = "all" if comparison.images == comparison.of else f"{comparison.images:,} of {comparison.of:,}"
    return f"""\
## Accuracy

{_table(("", "val %", "test %"), lines)}

Choice of weights: {SELECTED[stage.train.select if stage else None]}. Exported and original network were compared on
{sample} test images. Their logits differ by {comparison.difference:.2g} at most; the largest logit is
{comparison.scale:.3g}. They give the same class for {comparison.agreement:.2f} % of the images.
"""


def _origin(chain: Sequence[Member], made_with: Mapping[str, Any]) -> str:
    source, data = chain[-1].source, chain[-1].source.dataset
    content = f" (content {data.content})" if data.content else ""
    return f"""\
## Origin

Data: {data.name}{content}, augmentation {data.augment}, normalisation {source.normalize};
{_held_out(data)}.

The networks that led to it, in the order of training:

{_table(_HEADINGS, map(_cells, chain))}

{"".join(f"- {_trained(member.source)}" for member in chain)}
The mode (paper or reference) is not recorded with a stage. The settings that it decides are on this page.
Made with {", ".join(f"{name} {value}" for name, value in made_with.items())}; keys of format {FORMAT}.
"""


def _held_out(data: DatasetSpec) -> str:
    if data.val_images:
        return f"its own {data.val_images:,} validation images are for validation"
    if data.val_fraction:
        return (
            f"{data.val_fraction:g} of its training images, chosen by split_seed {data.split_seed}, are for validation"
        )
    return "all of its training images train"


def _table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *lines))


_HEADINGS = "role", "network", "learned from", "stage", "loss", "seed", "parameters", "weights", "val %", "test %"


def _cells(member: Member) -> tuple[str, ...]:
    """A member's line under _HEADINGS."""
    source, result = member.source, member.result
    loss, seed = "given weights", "–"
    if isinstance(source, Stage):
        loss, seed = source.loss.described, str(source.seed)
    size = "–" if member.size is None else in_bytes(member.size)
    accuracies = (percent(result.val_acc), percent(result.test_acc)) if result else ("–", "–")
    params = f"{result.params:,}" if result else "–"
    guides = " and ".join(guide.model for guide in source.guides) if isinstance(source, Stage) else ""
    return source.role, source.model, guides or "–", f"`{source.key}`", loss, seed, params, size, *accuracies


def _trained(source: Source) -> str:
    if not isinstance(source, Stage):
        return f"{source.role} {source.model}: given, as a file of sha256 {source.sha256}\n"
    begins = f", from weights of sha256 {source.init}" if source.init else ""
    part = ", the classifier alone" if source.freeze else ""
    return f"{source.role} {source.model}: {source.train.epochs} epochs, {training(source.train)}{begins}{part}\n"


def _version() -> str:
    """The project's version, and its commit if it is a checkout."""
    try:
        named = f"kd {version('kd')}"
    except PackageNotFoundError:  # run without being installed
        named = "kd"
    return f"{named}, commit {commit()}" if commit() else named
