"""`python -m kd.paper`: plans the papers' tables, prints the cost, trains what is missing, and writes a report."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from kd.app.config import Vary
from kd.core.spec import KnownError
from kd.store import Store, place
from kd.tools.paper import page
from kd.tools.paper.cost import Estimator
from kd.tools.paper.gather import gather
from kd.tools.paper.graph import graph
from kd.tools.paper.request import Copy, Request, profiles, shown
from kd.tools.paper.screen import print_costs, print_stages, print_tables
from kd.tools.paper.trainer import train
from kd.training.workplace import Workplace


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kd.paper", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for every cell: runtime.threads=1 method.T=5 …")
    parser.add_argument("--profile", default="smoke", help="smoke (default), cpu, full: conf/paper/profiles.yaml")
    parser.add_argument("--table", type=_names, default=(), metavar="ID,…", help="tables; default: all, in smoke a few")
    parser.add_argument("--row", type=_names, default=(), metavar="ID,…", help="rows of these tables; default: all")
    parser.add_argument("--seeds", type=_numbers, default=(), metavar="N,…", help="seeds; default: the profile's")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=FOLDER", help="another copy of a data set, e.g. cifar10=…"
    )
    parser.add_argument("--label", action="append", default=[], metavar="NAME=TEXT", help="name of that copy in tables")
    parser.add_argument(
        "--vary", choices=get_args(Vary), default="chain", help="what a seed varies; default: the whole chain"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--plan", action="store_true", help="print stages and cost, and train nothing")
    instead.add_argument("--report", action="store_true", help="write the report of what is stored, and train nothing")
    parser.add_argument("--out", type=Path, help="folder of the report; default: reports/<profile>")
    return parser.parse_intermixed_args(given)


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _numbers(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in _names(text)):
        raise argparse.ArgumentTypeError(f"should be whole numbers, e.g. 0,1,2 (got {text!r})")
    return tuple(int(part) for part in _names(text))


def main(given: Sequence[str]) -> int:
    """Do what the command line says. Returns the exit code: 1 if a stage failed or a table's data are missing."""
    arguments = _arguments(given)
    request = _request(arguments)
    planned = graph(request)
    config = planned.jobs[0].config
    store = Store(config.store_root)
    estimator = Estimator(Workplace(store, config.data_root, config.runtime))
    print(f"profile {request.name}: {request.profile.title}")
    for name, reason in planned.left_out.items():
        print(f"table {name} is left out: {reason}")
    out, failures = arguments.out or place(None, "reports") / request.name, dict[str, str]()
    if not arguments.report:
        stages = [stage for stage, _ in planned.stages.values()]
        costs = estimator.estimate(stages, {stage.key for stage in stages if store.whole(stage.key)})
        if arguments.plan:
            print_stages(costs)
        print_costs(costs, store)
        if arguments.plan:
            return 0
        failures = train(planned.stages, costs, store, out)
    report = gather(request, _shown(given), planned, store, failures, estimator.flops)
    written = page.write_report(report, out)
    print_tables(report)
    print(f"{out}: {', '.join(written)}")
    return 1 if failures or planned.left_out else 0


def _request(arguments: argparse.Namespace) -> Request:
    known = profiles()
    if arguments.profile not in known:
        raise KnownError(f"profile: should be one of {', '.join(known)} (got {arguments.profile!r})")
    folders, labels = _pairs("data", arguments.data), _pairs("label", arguments.label)
    if unknown := labels.keys() - folders.keys():
        raise KnownError(f"label: {', '.join(sorted(unknown))} has no --data; --label names a copy given by --data")
    copies = {
        name: Copy(Path(folder).expanduser(), labels.get(name, f"{name} (copy in {Path(folder).name})"))
        for name, folder in folders.items()
    }
    return Request(
        name=arguments.profile,
        profile=known[arguments.profile],
        tables=arguments.table,
        rows=arguments.row,
        seeds=arguments.seeds,
        copies=tuple(copies.items()),
        vary=arguments.vary,
        overrides=tuple(arguments.overrides),
    )


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    pairs = dict(text.partition("=")[::2] for text in given)
    if wrong := [name for name, value in pairs.items() if not value]:
        raise KnownError(f"{option}: should be <data set>=<value> (got {', '.join(wrong)})")
    return pairs


def _shown(given: Sequence[str]) -> str:
    """The command for records, without paths of this machine: folders are shown by name, --out is left out."""
    arguments = _arguments(given)
    told = ["--profile", arguments.profile, *map(shown, arguments.overrides)]
    for name in ("table", "row", "seeds"):
        if values := getattr(arguments, name):
            told += [f"--{name}", ",".join(map(str, values))]
    for name, folder in _pairs("data", arguments.data).items():
        told += ["--data", f"{name}=<{Path(folder).name}>"]
    for label in arguments.label:
        told += ["--label", label]
    return shlex.join(["python", "-m", "kd.paper", *told, "--vary", arguments.vary])
