"""Writes docs/experiments.md: every experiment, composed, parsed and planned. `make docs` runs it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from kd.app.config import Config, plan
from kd.app.experiments import CONF, experiments
from kd.app.options import register
from kd.app.parsing import parse
from kd.core.stage import Source, Stage
from kd.datasets import DATASETS, Facts, specify

PAGE = Path(__file__).with_suffix(".md")

_TINY = Facts(200, 64, (0.4802, 0.4481, 0.3975), (0.277, 0.2691, 0.2821))  # decoded ones are known when they are there
_HEAD = """# Experiments

Rows that the two projects publish (and a few marked as ours), each as one option of `experiment`. TAKD's other sizes
and paths of assistants are tables: `TABLE=size_cifar10` and `paths_cifar10` ([reproducing.md](reproducing.md)).

```
python run.py experiment=takd/cifar10/kd_resnet110_resnet8
python run.py -m experiment=tt/cifar10/normal_resnet18_net,tt/cifar10/nasty_resnet18_net seed=0,1,2
```

Everything else stays yours: `mode=reference` for the released code's numerics, `train.epochs=15` for a short look,
`method.T=…`, `seed=…`, another copy of the images by `dataset=folder dataset.root=…` (the recipe stays the
experiment's). A chain begins with the network that is trained first. The brackets behind a network say how it is
trained. No brackets: by cross-entropy alone. T and lambda: it learns from the network before it. T and weight: it is
a teacher that learns to teach, with the frozen network before it as its reference. With a weight below 0 it becomes a
nasty teacher. Networks that chains share are trained once. A nasty or trained teacher by itself is the second stage
of its chains, and is printed with them.

These options are declared in `conf/paper/`: `takd.yaml`, `trained_teacher.yaml` and `ours.yaml`. The tables of
`make reproduce-paper` use them too. An experiment of your own is a file: `experiment=mine/first` reads
`conf/experiment/mine/first.yaml`, and with `--config-dir=own` also `own/experiment/mine/first.yaml`. It needs a name
that is not in the tables below. It can start from one of them:

```yaml
# @package _global_
defaults:
  - /experiment/tt/cifar10/nasty_resnet18_net
  - override /model: preresnet20
seed: 3
```

*Written by `make docs`. A test compares this page with the declarations.*
"""


def planned(config: Config) -> Stage:
    """The student's stage, without a look at any image."""
    return plan(config, specify(config.dataset, DATASETS[config.dataset.name].facts or _TINY))[0]


def page() -> str:
    """The whole page."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = {name: compose("config", [f"experiment={name}"]) for name in sorted(experiments())}
    return "\n".join([_HEAD, *_sections(composed)]) + "\n"


def _sections(composed: dict[str, DictConfig]) -> Iterator[str]:
    for group, members in groupby(composed, key=lambda name: name.rpartition("/")[0]):
        yield f"## {group}\n"
        yield "| experiment | what it is | chain | epochs | mode |\n|---|---|---|---|---|"
        for name in members:
            config = parse(composed[name])
            chain = planned(config).chain
            epochs = ", ".join(dict.fromkeys(str(s.train.epochs) for s in chain if isinstance(s, Stage)))
            steps = " → ".join(_step(source) for source in chain)
            yield f"| `{name}` | {experiments()[name].about} | {steps} | {epochs} | {config.mode} |"
        yield ""


def _step(source: Source) -> str:
    settings = source.loss.settings.replace("=", " ") if isinstance(source, Stage) else ""
    return f"{source.model} ({settings})" if settings else source.model


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE} is written: {len(experiments())} experiments")
