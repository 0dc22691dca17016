"""Experiments: many training runs that answer one question, by one command.

``pliant experiment NAME`` walks through the cells of an experiment (`cells`), adds a row to
``results/`` for each (`walking`), times the same networks (`timing`), and writes a page that says
what the rows show (`claims`, `page`, `figure`).
"""

from research.experiments.cells import EXPERIMENTS, Cell, cells_of, rivals_of
from research.experiments.walking import run_cells, run_cells_together, states

__all__ = ["EXPERIMENTS", "Cell", "cells_of", "rivals_of", "run_cells", "run_cells_together", "states"]
