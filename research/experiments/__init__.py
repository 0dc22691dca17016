"""Experiments: many training runs that answer one question, by one command.

``python -m research experiment NAME`` trains what an experiment plans (`plans`), adds a row to
``results/`` for each run (`execution`), times the same networks (`network_times`), and writes a page
that says what the rows show (`claims`, `evidence_page`, `evidence_figure`).
"""

from research.experiments.execution import execute, execute_together, states
from research.experiments.plans import EXPERIMENTS, PlannedRun, planned_runs

__all__ = ["EXPERIMENTS", "PlannedRun", "execute", "execute_together", "planned_runs", "states"]
