"""BLEU and chrF of translation models by sacrebleu, by greedy decoding.

python score.py pairs/test.jsonl dense/ scratch/ compressed/
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from train import read_pairs
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import twofold  # noqa: F401 - transformers then load factorized checkpoints


@torch.inference_mode()
def translate(model: Any, tokenizer: Any, texts: list[str], batch_size: int) -> list[str]:
    """Translate texts, those of like length together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    translations = [""] * len(texts)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = tokenizer([texts[i] for i in chosen], return_tensors="pt", padding=True)
        most = 2 * batch["input_ids"].shape[1] + 10
        tokens = model.generate(**batch, num_beams=1, do_sample=False, max_new_tokens=most)
        for i, text in zip(chosen, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
            translations[i] = text.strip()
    return translations


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help='rows of "source" and "target"')
    parser.add_argument("models", nargs="+", help="folders of models with their tokenizers")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--limit", type=int, help="only the first pairs")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    sources, targets = zip(*read_pairs(args.pairs)[: args.limit], strict=True)
    rows = []
    for folder in args.models:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        translations = translate(model, AutoTokenizer.from_pretrained(folder), list(sources), args.batch_size)
        bleu, chrf = (score(translations, [list(targets)]) for score in (sacrebleu.corpus_bleu, sacrebleu.corpus_chrf))
        rows.append(
            {"model": folder, "parameters": sum(p.numel() for p in model.parameters()), "sentences": len(sources)}
        )
        rows[-1] |= {"bleu": round(bleu.score, 2), "chrf": round(chrf.score, 2)}
        print(json.dumps(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
