"""`python -m kd.inspection.surface`: the loss around finished networks."""

from kd.tools.command import run_command
from kd.tools.inspection.surface import main

if __name__ == "__main__":
    run_command(main)
