"""What a reader meets: `python -m bench.structure [overrides]` counts files, lines, and the files that one run crosses.

A run crosses a file if it executes a function of it. Importing a file, or a class in it, does not count.
"""

from __future__ import annotations

import ast
import atexit
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUN = ("model=resnet8", "teacher=resnet110", "method=kd", "train.epochs=1", "tracking=none", "runtime.threads=1")


def counted() -> str:
    """Files and lines of kd/ and run.py, yaml files, and what is longest."""
    sources = [*sorted((ROOT / "kd").rglob("*.py")), ROOT / "run.py"]
    lines = {path: path.read_text().count("\n") for path in sources}
    longest = max(
        ((node.end_lineno or 0) - node.lineno + 1, f"{path.relative_to(ROOT)}: {node.name}")
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    yaml = [*(ROOT / "conf").rglob("*.yaml")]
    file = max(sources, key=lines.__getitem__)
    return (
        f"{len(sources)} Python files, {sum(lines.values()):,} lines; {len(yaml)} yaml files; "
        f"longest function: {longest[0]} lines ({longest[1]}); longest file: {lines[file]} ({file.relative_to(ROOT)})"
    )


def follow_run(overrides: list[str]) -> None:
    """Run run.py in this process, and print the files that it crosses when it ends."""
    seen: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        named = code.co_flags & 0x2 and not code.co_name.startswith("<")  # no module and no class body
        if event == "call" and named and code.co_filename.startswith((f"{ROOT}/kd/", f"{ROOT}/run.py")):
            seen.add(code.co_filename)

    def tell() -> None:
        sys.setprofile(None)
        files = sorted(str(Path(name).relative_to(ROOT)) for name in seen)
        print(f"{len(files)} files crossed: {' '.join(files)}")

    atexit.register(tell)
    sys.argv = ["run.py", *overrides]
    sys.setprofile(note)
    runpy.run_path(str(ROOT / "run.py"), run_name="__main__")


def main() -> None:
    """Print the counts, then those of one run in a store of its own."""
    print(counted())
    with tempfile.TemporaryDirectory() as place:
        own = [f"runtime.store={place}/store", f"hydra.run.dir={place}/out"]
        command = [sys.executable, "-m", "bench.structure", "--follow", *(sys.argv[1:] or RUN), *own]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    print(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--follow"]:
        follow_run(sys.argv[2:])
    else:
        main()
