"""`python -m kd.paper`: plans the papers' tables, trains what is missing, and writes a report."""

from kd.tools.command import run_command
from kd.tools.paper.reproduction import main

if __name__ == "__main__":
    run_command(main)
