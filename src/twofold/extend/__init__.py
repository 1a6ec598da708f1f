"""What a package of yours needs to add a method, a format, a storage layer, a task or a kind of weight to Twofold.

Each is one file that registers itself when it is imported (docs/extend.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twofold.host.lazy import lazily

if TYPE_CHECKING:
    from twofold.allocate import Candidate as Candidate
    from twofold.allocate import Choice as Choice
    from twofold.allocate import allocation as allocation
    from twofold.errors import TwofoldError as TwofoldError
    from twofold.exports.decoding import Decoder as Decoder
    from twofold.exports.decoding import ModelDecoder as ModelDecoder
    from twofold.exports.formats import Source as Source
    from twofold.exports.formats import Written as Written
    from twofold.exports.formats import export_format as export_format
    from twofold.model.kinds import Kind as Kind
    from twofold.model.kinds import Sink as Sink
    from twofold.model.kinds import kind as kind
    from twofold.nn.compact import Compact as Compact
    from twofold.nn.compact import CompactLinear as CompactLinear
    from twofold.objectives import LayerMoments as LayerMoments
    from twofold.objectives import Problem as Problem
    from twofold.objectives import corrective_objective as corrective_objective
    from twofold.objectives import objective as objective
    from twofold.objectives import structural_objective as structural_objective
    from twofold.objectives._sides import gradient_side as gradient_side
    from twofold.objectives._sides import input_side as input_side
    from twofold.refine import Refined as Refined
    from twofold.refine import refinement as refinement
    from twofold.refine.steps.job import Job as Job
    from twofold.settings.base import Settings as Settings
    from twofold.settings.price import Price as Price
    from twofold.speed.runtimes import Runtime as Runtime
    from twofold.speed.runtimes import runtime as runtime
    from twofold.task import Batch as Batch
    from twofold.task import Data as Data
    from twofold.task import Samples as Samples
    from twofold.task import Task as Task
    from twofold.task import task as task
    from twofold.task.data.columns import Record as Record
    from twofold.task.data.examples import Example as Example
    from twofold.task.data.examples import ExampleTask as ExampleTask
    from twofold.task.data.examples import labelled as labelled
    from twofold.task.output import Output as Output
    from twofold.task.output.categorical import CATEGORICAL as CATEGORICAL
    from twofold.task.output.gaussian import GAUSSIAN as GAUSSIAN

__getattr__, __dir__ = lazily(__name__)
