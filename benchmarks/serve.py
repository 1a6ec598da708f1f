"""Many clients at once: is every answer over HTTP whole, and equal to the greedy answer to the same prompt offline?

    python benchmarks/serve.py small/                            # 16 clients, 200 requests, 32 tokens each
    python benchmarks/serve.py small/ --clients 4 --requests 20

It starts `twofold serve` on a free port, asks for chats and completions, streamed and not, and then answers the same prompts with
`generate` in this process. Exit code 1 if an answer differs, is cut short, or is an error.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import torch

from twofold.model.load import LoadedModel, load_model

BEGINNINGS = (
    "The castle of", "In the morning,", "A matrix of low rank", "The river", "Once upon a time", "Bread is made of",
    "The first king", "To open the door,", "Music", "The largest city", "Water boils", "My grandmother",
)  # fmt: skip
ENDINGS = ("", " it", " the old", " people", " on the hill,", " every year", " and then", " nobody")


def prompts(count: int) -> list[str]:
    """So many prompts, of which no two are the same until all pairs are used up."""
    pairs = [beginning + ending for ending in ENDINGS for beginning in BEGINNINGS]
    return [pairs[number % len(pairs)] for number in range(count)]


def ask(client: openai.OpenAI, model: str, number: int, prompt: str, tokens: int, chats: bool) -> str:
    """One answer; every second request is streamed, and every third is a chat if the model takes chats."""
    how = {"model": model, "max_tokens": tokens, "temperature": 0, "stream": number % 2 == 1}
    if chats and number % 3 == 0:
        answer = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **how)
        if how["stream"]:
            return "".join(part.choices[0].delta.content or "" for part in answer)
        return answer.choices[0].message.content
    answer = client.completions.create(prompt=prompt, **how)
    return "".join(part.choices[0].text for part in answer) if how["stream"] else answer.choices[0].text


@torch.no_grad()
def offline(loaded: LoadedModel, number: int, prompt: str, tokens: int, chats: bool) -> str:
    """The greedy answer to the same request, in this process."""
    tokenizer = loaded.tokenizer
    if chats and number % 3 == 0:
        talk = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        ids = tokenizer(prompt, return_tensors="pt")
    out = loaded.model.generate(**ids, do_sample=False, max_new_tokens=tokens)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    command = [sys.executable, "-m", "twofold", "serve", given.model, "--port", "0", "--queue", str(given.clients)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()  # Serving NAME at URL (…)
        if not line.startswith("Serving "):
            sys.exit("the server did not start")
        threading.Thread(target=server.stdout.read, daemon=True).start()
        name, url = line.removeprefix("Serving ").split(" (")[0].rsplit(" at ", 1)
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600)
        loaded = load_model(given.model, device="cpu")
        chats = loaded.tokenizer.chat_template is not None
        asked = list(enumerate(prompts(given.requests)))

        def one(item: tuple[int, str]) -> str | Exception:
            try:
                return ask(client, name, *item, given.tokens, chats)
            except openai.OpenAIError as error:
                return error

        started = time.perf_counter()
        with ThreadPoolExecutor(given.clients) as pool:
            answers = list(pool.map(one, asked))
        seconds = time.perf_counter() - started
    finally:
        server.terminate()
        server.wait()
    errors = [str(answer) for answer in answers if isinstance(answer, Exception)]
    equal = sum(
        isinstance(answer, str)
        # A stream holds back a character that is not whole, where an answer ends in the middle of one.
        and answer.rstrip("\ufffd") == offline(loaded, *item, given.tokens, chats).rstrip("\ufffd")
        for item, answer in zip(asked, answers, strict=True)
    )
    print(
        json.dumps(
            {
                "model": given.model,
                "clients": given.clients,
                "requests": given.requests,
                "tokens": given.tokens,
                "chats": chats,
                "equal_to_offline": equal,
                "errors": errors[:3],
                "different_answers": len({answer for answer in answers if isinstance(answer, str)}),
                "seconds": round(seconds, 1),
                "threads": torch.get_num_threads(),
            },
            indent=1,
        )
    )
    sys.exit(0 if equal == given.requests else 1)


if __name__ == "__main__":
    main()
