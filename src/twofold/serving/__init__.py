"""A model that answers: over HTTP as OpenAI's API does, and in the terminal."""
