"""What was done to a model and why: the page report.html and the model card README.md, which alone import matplotlib."""
