"""``python -m research COMMAND``, from a checkout."""

from pliant.cli import run
from research.commands import app

if __name__ == "__main__":
    run(app)
