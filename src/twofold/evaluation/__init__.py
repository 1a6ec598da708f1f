"""Quality and size, measured: perplexity, divergence and agreement, bytes on disk and in memory."""
