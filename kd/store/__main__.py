"""`python -m kd.store`: list, check, show and remove stages."""

from kd.tools.command import run_command
from kd.tools.store import main

if __name__ == "__main__":
    run_command(main)
