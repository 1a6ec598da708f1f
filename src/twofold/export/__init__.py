"""Exports: a model in the form that other programs read, each compared with the model that it was made from."""

from twofold.export.base import FORMATS
from twofold.export.carry_out import Exported, export_model
from twofold.export.compare import Comparison
from twofold.export.decoding import Decoder, ModelDecoder, greedy

__all__ = ["FORMATS", "Comparison", "Decoder", "Exported", "ModelDecoder", "export_model", "greedy"]
