"""What was done to a model and why: the page report.html and the model card README.md.

matplotlib is imported only when a report is written.
"""
