"""The measures of tasks as others publish them, by the libraries that others use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twofold.errors import TwofoldError


def word_error_rate(heard: Sequence[str], right: Sequence[str], tokenizer: Any) -> dict[str, float]:
    """Return the word error rate over all clips, after Whisper's normalizer of English."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    try:
        import jiwer
    except ImportError as error:
        raise TwofoldError("the word error rate needs the package jiwer: pip install 'twofold[speech]'") from error
    normalize = EnglishTextNormalizer(getattr(tokenizer, "english_spelling_normalizer", None) or {})
    pairs = [(normalize(reference), normalize(words)) for reference, words in zip(right, heard, strict=True)]
    pairs = [pair for pair in pairs if pair[0]]  # of nothing said, nothing can be wrong
    if not pairs:
        return {}
    return {"wer": float(jiwer.wer([reference for reference, _ in pairs], [words for _, words in pairs]))}


def translation_scores(written: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """Return corpus BLEU and chrF by sacrebleu, from 0 to 100."""
    try:
        import sacrebleu
    except ImportError as error:
        raise TwofoldError("BLEU and chrF need the package sacrebleu: pip install 'twofold[translation]'") from error
    references = [list(right)]
    bleu, chrf = sacrebleu.corpus_bleu(list(written), references), sacrebleu.corpus_chrf(list(written), references)
    return {"bleu": float(bleu.score), "chrf": float(chrf.score)}


def rank_correlation(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return Spearman's correlation of two lists of numbers."""
    import numpy as np

    def ranks(values: Sequence[float]) -> np.ndarray[Any, Any]:
        _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        after = np.cumsum(counts)
        return ((2 * after - counts + 1) / 2)[inverse]  # equal values share the mean of their ranks

    if len(set(ours)) < 2 or len(set(theirs)) < 2:
        return {}
    return {"spearman": float(np.corrcoef(ranks(ours), ranks(theirs))[0, 1])}
