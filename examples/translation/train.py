"""A small translation model of Marian's shape, trained from nothing: dense, or factorized from the first step on.

    python train.py pairs/ dense/
    python train.py pairs/ scratch/ --keep 0.5

The first folder holds train.jsonl and dev.jsonl, rows of "source" and "target" (``pairs.py``). The second gets the model and its
tokenizer, as transformers load them, and after every epoch what a run needs to go on from there (state.pt): call it again after a
stop. With ``--keep`` import twofold before ``MarianMTModel.from_pretrained``.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import MarianConfig, MarianMTModel, PreTrainedTokenizerFast

import twofold

PAD, EOS = 0, 1
Pair = tuple[list[int], list[int]]  # tokens of the source and of the target, each with the end of the sentence


def read_pairs(path: Path) -> list[tuple[str, str]]:
    rows = map(json.loads, path.read_text("utf-8").splitlines())
    return [(row["source"], row["target"]) for row in rows]


def make_tokenizer(pairs: list[tuple[str, str]], size: int) -> PreTrainedTokenizerFast:
    """Learn one byte-level BPE vocabulary of both languages."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((side for pair in pairs for side in pair), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=256, padding_side="right"
    )


def make_config(args: argparse.Namespace, vocabulary: int) -> MarianConfig:
    sizes = {
        f"{stack}_{what}": value
        for stack in ("encoder", "decoder")
        for what, value in (("layers", args.layers), ("attention_heads", args.heads), ("ffn_dim", 4 * args.width))
    }
    return MarianConfig(
        architectures=["MarianMTModel"],
        vocab_size=vocabulary,
        d_model=args.width,
        **sizes,
        dropout=args.dropout,
        activation_function="relu",
        max_position_embeddings=256,
        init_std=args.width**-0.5,  # with tied embeddings of this scale logits start at about unit variance
        scale_embedding=True,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        decoder_start_token_id=PAD,
        eos_token_id=EOS,
        forced_eos_token_id=EOS,
    )


def make_batches(pairs: list[Pair], tokens: int, shuffle: random.Random) -> list[list[Pair]]:
    """Put sentences of like length together, so that little is padding, with at most so many tokens of the longer side."""
    order = sorted(pairs, key=lambda pair: (max(map(len, pair)) + shuffle.random(), shuffle.random()))
    batches: list[list[Pair]] = [[]]
    for pair in order:
        if batches[-1] and max(map(len, pair)) * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(pair)
    shuffle.shuffle(batches)
    return batches


def padded(rows: list[list[int]], value: int) -> Tensor:  # (rows, longest)
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def loss_of(model: nn.Module, batch: list[Pair], smoothing: float = 0.0) -> tuple[Tensor, int]:
    """Return the mean loss in nats a token, and how many tokens were predicted."""
    sources, targets = zip(*batch, strict=True)
    source, labels = padded(list(sources), PAD), padded(list(targets), -100)
    known = padded(
        [[PAD, *target[:-1]] for target in targets], PAD
    )  # begins with the decoder's start, as Marian's does
    logits = model(input_ids=source, attention_mask=(source != PAD).long(), decoder_input_ids=known).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    return loss, int((labels != -100).sum())


@torch.no_grad()
def dev_loss(model: nn.Module, batches: list[list[Pair]]) -> float:
    model.eval()
    losses = [(float(loss), count) for loss, count in (loss_of(model, batch) for batch in batches)]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def train_epoch(
    model: nn.Module, batches: list[list[Pair]], optimizer: torch.optim.Optimizer, schedule: LambdaLR, smoothing: float
) -> Iterator[float]:
    """Yield the loss of each step."""
    model.train()
    for batch in batches:
        loss, _ = loss_of(model, batch, smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield float(loss.detach())


def save(out: Path, model: MarianMTModel, **state: object) -> None:
    """Write the model, and the state to go on from, whole or not at all."""
    model.save_pretrained(out)
    torch.save({"model": model.state_dict(), "torch": torch.get_rng_state(), **state}, out / "state.part")
    (out / "state.part").replace(out / "state.pt")


def go_on(out: Path, model: MarianMTModel, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> int:
    """Put everything back as it was after the last whole epoch, and return how many are done."""
    state = torch.load(out / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["torch"])
    return int(state["epoch"])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--keep", type=float, help="share of the factorized weights' parameters; dense if it is left out"
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2, help="of the encoder, and of the decoder")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--batch-tokens", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--scale", default="none", help="how steps are scaled: see twofold.training_optimizer")
    parser.add_argument("--threads", type=int)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    texts = {part: read_pairs(args.data / f"{part}.jsonl") for part in ("train", "dev")}
    tokenizer = make_tokenizer(texts["train"], args.vocabulary)
    tokenizer.save_pretrained(args.out)
    pairs = {
        part: [(tokenizer(s)["input_ids"], tokenizer(text_target=t)["input_ids"]) for s, t in rows]
        for part, rows in texts.items()
    }
    config = make_config(args, len(tokenizer))
    if args.keep is None:
        torch.manual_seed(args.seed)
        model = MarianMTModel(config)
    else:
        model = twofold.factorize(config, init="spectral", keep=args.keep, seed=args.seed)
    optimizer = twofold.training_optimizer(model, lr=args.lr, scale=args.scale, betas=(0.9, 0.98))
    shuffle = random.Random(args.seed)
    dev = make_batches(pairs["dev"], args.batch_tokens, random.Random(0))
    steps = args.epochs * len(make_batches(pairs["train"], args.batch_tokens, random.Random(0)))
    warmup = max(1, steps // 10)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warmup, max(0.02, (steps - step) / (steps - warmup))))
    torch.manual_seed(args.seed)  # of the dropout
    done = 0
    if (args.out / "state.pt").exists():
        done = go_on(args.out, model, optimizer, schedule)
        for _ in range(done):  # the order of the epochs that are done
            make_batches(pairs["train"], args.batch_tokens, shuffle)
    print(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters, {steps} steps", flush=True)
    for epoch in range(done, args.epochs):
        start, losses = time.perf_counter(), []
        batches = make_batches(pairs["train"], args.batch_tokens, shuffle)
        for loss in train_epoch(model, batches, optimizer, schedule, args.smoothing):
            losses.append(loss)
            if len(losses) % 100 == 0:
                seconds = time.perf_counter() - start
                print(f"  {len(losses)}/{len(batches)} loss {sum(losses[-100:]) / 100:.3f} {seconds:.0f} s", flush=True)
        seconds, mean, held_out = time.perf_counter() - start, sum(losses) / len(losses), dev_loss(model, dev)
        print(f"epoch {epoch + 1} loss {mean:.3f} dev {held_out:.3f} {seconds:.0f} s", flush=True)
        save(args.out, model, optimizer=optimizer.state_dict(), schedule=schedule.state_dict(), epoch=epoch + 1)


if __name__ == "__main__":
    main()
