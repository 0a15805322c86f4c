"""`python -m kd.predict`: the classes of pictures, by a finished or an exported network."""

from kd.tools.command import run_command
from kd.tools.predict import main

if __name__ == "__main__":
    run_command(main)
