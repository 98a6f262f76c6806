"""Methods: ops composed into a MergePlan, and the schedules that drive them."""

from .abm import abm_plan
from .lgtm import lgtm_plan
from .schedule import alpha_schedule
from .sito import sito_plan
from .tome import tome_plan

__all__ = ["abm_plan", "alpha_schedule", "lgtm_plan", "sito_plan", "tome_plan"]
