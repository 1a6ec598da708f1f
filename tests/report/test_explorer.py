"""The live part of the page: what it plans from, and that it plans what the program plans."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

import twofold
from twofold.allocate import ALLOCATIONS, Candidate, Choice
from twofold.report.explorer import MOST, embedded, thinned

ROOT = Path(__file__).resolve().parents[2]
