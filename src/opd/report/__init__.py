"""The report of a run, or of several beside one another: one HTML file from run folders, and a verdict in one line.
Loads no torch."""

from opd.report.page import judged, render
from opd.report.verdict import Verdict

__all__ = ["Verdict", "judged", "render"]
