"""The texts of ``calibration=demo``: some 10,000 tokens, in the package, so that a first run need not sample any.

demo.jsonl holds stories, letters, essays, recipes, minutes, instructions, tables, code, and conversations. All of it was written
for Twofold, and is under the licence of the package (LICENSE); nothing was copied, and the people in it are made up.
"""

from __future__ import annotations

from pathlib import Path

DEMO = "demo"  # the name of the source; a file of that name is ./demo
DEMO_FILE = Path(__file__).with_name("demo.jsonl")
