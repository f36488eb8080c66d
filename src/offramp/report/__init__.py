"""One report document, two renderings: a few tables in the terminal, a page that stands alone in a browser.

Both read the plain dictionary that `CachedModel.report()` returns, plus an optional key `evaluation` with
`Evaluation.to_json()`. The page needs plotly (`pip install 'offramp[report]'`), the terminal does not.
"""

from offramp.report.page import html, write_html
from offramp.report.tables import evaluation_table, optimized_table, profile_table, terminal

__all__ = ["evaluation_table", "html", "optimized_table", "profile_table", "terminal", "write_html"]
