"""Exports: a model in the form that other programs read, each compared with the model that it was made from."""

from twofold.exports.base import FORMATS
from twofold.exports.carry_out import Exported, export_model
from twofold.exports.compare import Comparison
from twofold.exports.decoding import Decoder, ModelDecoder, greedy

__all__ = ["FORMATS", "Comparison", "Decoder", "Exported", "ModelDecoder", "export_model", "greedy"]
