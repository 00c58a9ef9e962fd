"""Pages of HTML that need nothing beside them: charts, thumbnails, and the look that all of them share."""

from vimfast.pages.charts import Bar, BarChart, LineChart, Mark, Series
from vimfast.pages.page import render
from vimfast.pages.thumbnails import thumbnail

__all__ = ["Bar", "BarChart", "LineChart", "Mark", "Series", "render", "thumbnail"]
