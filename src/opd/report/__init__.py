"""The report of a run, or of several beside one another: one HTML file from run folders. Loads no torch."""

from opd.report.page import render

__all__ = ["render"]
