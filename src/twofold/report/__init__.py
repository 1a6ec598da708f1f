"""What was done to a model and why: the page report.html and the model card README.md.

matplotlib is imported only when a report is written.
"""

from twofold.report.card import write_card
from twofold.report.page import write_report

__all__ = ["write_card", "write_report"]
