"""From texts to token windows to moments."""
