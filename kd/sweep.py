"""`python -m kd.sweep watch multirun/…`: the jobs of a sweep, from another shell. `kd.sweep` itself is a function."""

from kd.tools.command import run_command
from kd.tools.watch import main

if __name__ != "__main__":  # an import would put this module in the place of the function
    raise ImportError("kd.sweep is a function of kd, and the command python -m kd.sweep")
run_command(main)
