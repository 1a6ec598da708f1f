"""A model that answers: over HTTP as OpenAI's API does, and in the terminal."""

from twofold.serving.chat import chat
from twofold.serving.server import serve

__all__ = ["chat", "serve"]
