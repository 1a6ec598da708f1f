"""The server: whole answers, equal to those offline, for many clients at once; and what goes wrong ends in one sentence."""

from __future__ import annotations

import importlib.util
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
import uvicorn

import twofold
import twofold.cli
from conftest import TEXT, interruptible, make_model, make_tokenizer
from twofold import TwofoldError
from twofold.model.load import LoadedModel
from twofold.serving.chat import Conversation
from twofold.serving.server import build_app, listen, serve

HI = [{"role": "user", "content": "Hi"}]
TEMPLATE = (
    "{% if messages[0]['role'] == 'odd' %}{{ raise_exception('no odd roles') }}{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
QUEUE = 20


def loaded(template=TEMPLATE):
    settings = {"keep": 0.6, "texts": [TEXT], "tokens": 64, "window": 32, "quiet": True}
    model = make_model("gpt2", seed=3)
    model.generation_config.eos_token_id = None  # answers of the length that was asked for
    tokenizer = make_tokenizer()
    model = twofold.factorize(model, tokenizer, **settings).eval()
    tokenizer.chat_template = template
    return LoadedModel(model, tokenizer, "small", None, torch.float32)


class Running:
    """A server in a thread of this process."""

    def __init__(self, template=TEMPLATE, queue=QUEUE):
        self.loaded = loaded(template)
        self.app = build_app(self.loaded, "small", queue)
        place = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{place.getsockname()[1]}/v1"
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [place]}, daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 30
        while not self.server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(timeout=10)

    def client(self):
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0)

    def offline(self, prompt, count, **template):
        tokenizer, model = self.loaded.tokenizer, self.loaded.model
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(ids, do_sample=False, max_new_tokens=count)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def wait_until_empty(self):
        deadline = time.monotonic() + 10
        while self.app.inside:
            assert time.monotonic() < deadline, "the request goes on for a client that has left"
            time.sleep(0.01)


@pytest.fixture(scope="module")
def running():
    running = Running()
    yield running
    running.stop()


@pytest.fixture
def slow(running, monkeypatch):
    """Each token takes long enough to leave in the middle of an answer."""
    forward = running.loaded.model.forward

    def slowly(*inputs, **settings):
        time.sleep(0.05)
        return forward(*inputs, **settings)

    monkeypatch.setattr(running.loaded.model, "forward", slowly)
    return running


@pytest.mark.long
def test_many_clients_get_the_answers_of_offline(running):
    client = running.client()
    prompts = [
        f"The {word} of {place}" for word in ("castle", "market", "bridge") for place in ("Arles", "Cádiz", "Derry")
    ]

    def ask(number):
        prompt, count = prompts[number % len(prompts)], 4 + number % 5
        how = {"model": "small", "max_tokens": count, "temperature": 0}
        if number % 3 == 0:
            messages = [{"role": "user", "content": prompt}]
            answer = client.chat.completions.create(messages=messages, **how)
            return (
                f"user: {prompt}\nassistant:",
                count,
                answer.choices[0].message.content,
                answer.choices[0].finish_reason,
            )
        if number % 3 == 1:
            answer = client.completions.create(prompt=prompt, **how)
            assert answer.usage.completion_tokens == count and answer.model == "small"
            return prompt, count, answer.choices[0].text, answer.choices[0].finish_reason
        parts = list(client.completions.create(prompt=prompt, stream=True, **how))
        return prompt, count, "".join(p.choices[0].text for p in parts), parts[-1].choices[0].finish_reason

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(48)))
    for number, (prompt, count, text, reason) in enumerate(answers):
        expected = running.offline(prompt, count)
        if number % 3 == 2:  # a stream holds back a character that is not whole
            expected, text = expected.rstrip("\ufffd"), text.rstrip("\ufffd")
        assert text == expected
        assert reason == "length"
    assert len({text for _, _, text, _ in answers}) > 6, "the model must not answer everything alike"


@pytest.mark.long
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_seed_gives_the_answer_that_it_gives_alone(path, running):
    what = {"prompt": "The castle"} if path == "completions" else {"messages": HI, "chat_template_kwargs": None}

    def ask(seed, stream):
        body = {**what, "max_tokens": 12, "temperature": 1.5, "seed": seed, "stream": stream}
        answer = httpx.post(f"{running.url}/{path}", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        if not stream:
            choice = answer.json()["choices"][0]
            return choice.get("text") or choice["message"]["content"]
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        choices = [json.loads(line)["choices"][0] for line in lines]
        return "".join(c.get("text") or (c.get("delta") or {}).get("content") or "" for c in choices)

    jobs = [(seed, stream) for seed in range(4) for stream in (False, True)]
    alone = [ask(*job) for job in jobs]
    assert len(set(alone)) >= 4, "another seed gives another answer"
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda job: ask(*job), jobs * 2))
    assert together == alone * 2


def test_a_chat_streams(running):
    parts = list(
        running.client().chat.completions.create(
            model="small", messages=[{"role": "user", "content": "Hi"}], max_tokens=6, temperature=0, stream=True
        )
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text.rstrip("\ufffd") == running.offline("user: Hi\nassistant:", 6).rstrip("\ufffd")
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason == "length"


def test_the_server_has_one_model_and_no_other_doors(running):
    assert [model.id for model in running.client().models.list()] == ["small"]
    root = running.url.removesuffix("/v1")
    assert httpx.get(f"{root}/health").json() == {"status": "ok"}
    assert httpx.post(f"{root}/load_model", json={"model": "other"}).status_code == 404
    assert httpx.post(f"{root}/reset").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", {"prompt": "x" * 500}, 400, "the prompt has 500 tokens and the model's context 128"),
        ("completions", {"prompt": "x" * 500, "stream": True}, 400, "shorten it"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 500}]}, 400, "the model's context 128"),
        ("completions", {"prompt": ""}, 400, "the prompt is empty"),
        ("completions", {"prompt": ["a", "b"]}, 400, "prompt must be a text"),
        ("completions", {}, 400, "prompt must be a text"),
        ("completions", {"prompt": "a", "model": "other"}, 404, "this server has the model small, not other"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens must be a whole number above 0"),
        ("completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature must be a number"),
        ("completions", {"prompt": "a", "n": 3}, 400, "n must be 1"),
        ("completions", {"prompt": "a", "generation_config": "{}"}, 400, "generation_config is not taken"),
        ("completions", {"prompt": "a", "unheard_of": 1}, 422, "unheard_of"),
        ("chat/completions", {"messages": []}, 400, "messages must be a list"),
        ("chat/completions", {"messages": ["hello"]}, 400, "messages must be a list"),
        ("completions", [1], 400, "no JSON object"),
        ("completions", {"prompt": "a", "top_p": 1.5}, 400, "top_p must be a number between 0 and 1"),
        ("completions", {"prompt": "a", "frequency_penalty": -1}, 400, "frequency_penalty must be a number above -1"),
        ("completions", {"prompt": "a", "frequency_penalty": "x"}, 400, "frequency_penalty must be a number above -1"),
        ("completions", {"prompt": "a", "seed": "x"}, 400, "seed must be a whole number"),
        ("completions", {"prompt": "a", "seed": True}, 400, "seed must be a whole number"),
        ("chat/completions", {"messages": HI, "chat_template_kwargs": 3}, 400, "must be an object"),
        (
            "chat/completions",
            {"messages": HI, "chat_template_kwargs": {"chat_template": "x"}},
            400,
            "can't set chat_temp",
        ),
        ("chat/completions", {"messages": HI, "chat_template_kwargs": {"tokenize": False}}, 400, "can't set tokenize"),
        ("chat/completions", {"messages": [{"role": "odd", "content": "x"}]}, 400, "refuses the conversation (no odd"),
        ("chat/completions", {"messages": HI, "chat_template_kwargs": None, "max_tokens": 0}, 400, "max_tokens"),
    ],
)
def test_bad_requests_get_one_sentence(path, body, status, message, running):
    answer = httpx.post(f"{running.url}/{path}", json=body)
    assert answer.status_code == status and message in answer.json()["error"]["message"], answer.text
    running.wait_until_empty()


def test_what_is_no_json_and_what_is_too_large(running, monkeypatch):
    assert httpx.post(f"{running.url}/completions", content=b"{bad").status_code == 400
    monkeypatch.setattr("twofold.serving.gate.LARGEST", 100)
    answer = httpx.post(f"{running.url}/completions", json={"prompt": "x" * 200})
    assert answer.status_code == 413
    running.wait_until_empty()


def test_an_answer_ends_where_the_context_ends(running):
    answer = running.client().completions.create(model="small", prompt="x" * 120, max_tokens=1000, temperature=0)
    assert answer.usage.completion_tokens == 8 and answer.choices[0].finish_reason == "length"


@pytest.mark.long
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_not_answered_any_further(stream, slow):
    body = {"prompt": "The castle", "max_tokens": 110, "temperature": 0, "stream": stream}
    started = time.monotonic()
    if stream:
        with httpx.stream("POST", f"{slow.url}/completions", json=body) as answer:
            for number, _ in enumerate(answer.iter_lines()):
                if number == 3:
                    break
    else:
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{slow.url}/completions", json=body, timeout=0.3)
    slow.wait_until_empty()
    # The next answer does not wait for the rest of the one that nobody reads (110 tokens of 0.05 s).
    text = (
        slow.client()
        .completions.create(model="small", prompt="The market", max_tokens=3, temperature=0)
        .choices[0]
        .text
    )
    assert time.monotonic() - started < 4
    assert text == slow.offline("The market", 3)


@pytest.mark.long
def test_a_full_queue_refuses_with_a_sentence(slow):
    how = {"model": "small", "prompt": "The castle", "max_tokens": 4, "temperature": 0}

    def ask(_):
        try:
            return slow.client().completions.create(**how).choices[0].text
        except openai.APIStatusError as error:
            return error

    with ThreadPoolExecutor(QUEUE + 6) as pool:
        answers = list(pool.map(ask, range(QUEUE + 6)))
    refused = [answer for answer in answers if isinstance(answer, openai.APIStatusError)]
    assert refused and all(error.status_code == 503 and "the queue is full" in str(error.body) for error in refused)
    assert refused[0].response.headers["retry-after"] == "1"
    assert {answer for answer in answers if isinstance(answer, str)} == {slow.offline("The castle", 4)}
    assert len(answers) - len(refused) >= QUEUE, "those that were let in are all answered"
    assert slow.client().completions.create(**how).choices[0].text == slow.offline("The castle", 4), "and it goes on"


def test_what_can_not_be_served(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(TwofoldError, match=r"can't listen at .* name another `port`"):
            serve(str(tmp_path), port=taken.getsockname()[1])
    with pytest.raises(TwofoldError, match="has no tokenizer"):
        build_app(LoadedModel(make_model(), None, "m", None, torch.float32), "m")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "uvicorn" else find(name, *a))
    with pytest.raises(TwofoldError, match=r"needs uvicorn.*pip install 'twofold\[serve\]'"):
        serve(str(tmp_path))


def test_a_base_model_completes_and_does_not_chat():
    base = Running(template=None, queue=2)
    answer = httpx.post(f"{base.url}/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
    assert answer.status_code == 400 and "has no chat template; use /v1/completions" in answer.text
    answer = httpx.post(f"{base.url}/completions", json={"prompt": "Hi", "max_tokens": 2, "temperature": 0})
    assert answer.status_code == 200
    base.stop()


@pytest.mark.long
def test_the_command_serves_until_it_is_stopped(tmp_path):
    said = loaded()
    said.model.save_pretrained(tmp_path / "small")
    said.tokenizer.save_pretrained(tmp_path / "small")
    command = [sys.executable, "-m", "twofold", "serve", str(tmp_path / "small"), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    ) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("Serving small at http://127.0.0.1:"), line + process.stderr.read()
            client = openai.OpenAI(base_url=line.split(" at ")[1].split()[0], api_key="none", max_retries=0)
            answer = client.completions.create(model="small", prompt="The castle", max_tokens=5, temperature=0)
            ids = said.tokenizer("The castle", return_tensors="pt")["input_ids"]
            out = said.model.generate(ids, do_sample=False, max_new_tokens=5)
            assert answer.choices[0].text == said.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()
        assert "Traceback" not in process.stderr.read()


def chat(monkeypatch, capsys, folder, lines, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    monkeypatch.setattr(sys, "argv", ["twofold", "chat", str(folder), *arguments])
    code = 0
    try:
        twofold.cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_chat_through_a_pipe(tmp_path, monkeypatch, capsys):
    said = loaded()
    said.model.save_pretrained(tmp_path / "small")
    said.tokenizer.save_pretrained(tmp_path / "small")
    code, out, err = chat(
        monkeypatch, capsys, tmp_path / "small", "Hi\n\nAnd then?\n", "--max-tokens", "4", "--system", "Be brief."
    )
    assert code == 0, err
    talk = Conversation(said, "Be brief.", 4, 0.0)
    first, _ = talk.answer("Hi")
    second, _ = talk.answer("And then?")
    assert capsys.readouterr().out == out, "the same, streamed, and nothing else on standard output"
    assert out == f"{first}\n{second}\n"
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 2
    code, out, err = chat(monkeypatch, capsys, tmp_path / "small", "x" * 500 + "\n")
    assert code == 2 and "with no room for an answer; write less" in err and out == ""


def test_a_conversation_remembers_forgets_and_is_cleared(capsys):
    said = loaded()
    talk = Conversation(said, None, 3, 0.0)
    talk.answer("Hi")
    remembered, _ = talk.answer("What?")
    talk.clear()
    alone, _ = talk.answer("What?")
    assert remembered != alone, "what was said before matters"
    for _ in range(3):
        _, forgot = talk.answer("x" * 40)
    assert forgot and talk.turns[0]["content"] == "x" * 40
    base = Conversation(loaded(template=None), None, 3, 0.0)
    text, _ = base.answer("Once upon")
    ids = said.tokenizer("Once upon", return_tensors="pt")["input_ids"]
    out = said.model.generate(ids, do_sample=False, max_new_tokens=3)
    assert text == said.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    with pytest.raises(TwofoldError, match="has no chat template, so it can't be told a `system`"):
        Conversation(loaded(template=None), "Be brief.", 3, 0.0)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    with pytest.raises(TwofoldError, match=r"refuses the conversation \(no system\); leave `system` out"):
        Conversation(loaded(template=refusing), "Be brief.", 3, 0.0)
