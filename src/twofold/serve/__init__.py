"""A model that answers: over HTTP as OpenAI's API does, and in the terminal."""

from twofold.serve.chat import chat
from twofold.serve.server import serve

__all__ = ["chat", "serve"]
