"""Many methods on many models, from one suite file: results as JSON lines, a table and a page of plots.

`suite` reads the file, `run` fits and measures, `results` keeps the lines, `table` and `plots` show them; `digits` is
data to try it on.
"""

from offramp.bench.run import Outcome, run_suite
from offramp.bench.suite import Suite, read_suite

__all__ = ["Outcome", "Suite", "read_suite", "run_suite"]
