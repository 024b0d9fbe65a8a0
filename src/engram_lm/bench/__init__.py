"""What things cost, beside what others' cost: measured in one run, so that ratios hold whatever else the machine does."""

from .measure import Contender, Meter, WrongResultError
from .results import Case, Entry, Results

__all__ = ["Case", "Contender", "Entry", "Meter", "Results", "WrongResultError"]
