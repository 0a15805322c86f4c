"""`python -m kd.export`: a finished network as a file for deployment."""

from kd.tools.command import run_command
from kd.tools.export.exporter import main

if __name__ == "__main__":
    run_command(main)
