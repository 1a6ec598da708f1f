"""The served page: who may ask, what both models make of a text, and that nothing of the folder but its data comes into it."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

import twofold
import twofold.cli
from conftest import make_model, make_tokenizer
from short import shorten
from twofold import TwofoldError
from twofold.exploring import models as models_file
from twofold.exploring.app import QUEUE, build_app
from twofold.exploring.models import ANSWER, Models, RefusedError
from twofold.exploring.reading import divergences, piece
from twofold.exploring.server import explore, find_models, tell_page
from twofold.exploring.sizes import find_sizes
from twofold.report.explorer import embedded
from twofold.report.messages import Words

TOKEN, PORT = "t0ken", 8321
HOW = {"dtype": "auto", "device": "auto"}
TEXT = "The bridge of Cádiz "


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with an original and two sizes of it."""
    folder = tmp_path_factory.mktemp("runs")
    make_model().save_pretrained(folder / "tiny")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}"
    tokenizer.save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWOFOLD_CACHE", str(folder / "cache"))
        shorten(patch.setattr)
        for keep in (0.4, 0.8):
            twofold.compress(
                str(folder / "tiny"), folder / "sizes" / f"keep-{keep}", keep=keep, objective="svd", quiet=True
            )
    return folder


@pytest.fixture
def sizes(runs):
    return find_sizes(runs / "sizes")


def app_of(sizes, against=None, lang="en"):
    models = find_models(sizes, against, HOW)
    return build_app(sizes, models, tell_page(sizes, models), PORT, TOKEN, Words(lang))


class Client(TestClient):
    """A page that has the token."""

    def request(self, method, url, params=None, **how):
        return super().request(method, url, params={"token": TOKEN, **(params or {})}, **how)


def client_of(app):
    return Client(app, base_url=f"http://127.0.0.1:{PORT}", raise_server_exceptions=False)


@pytest.fixture
def client(sizes):
    return client_of(app_of(sizes))


def asked(**other):
    return {"size": "keep-0.4", "text": TEXT, **other}


def told(page):
    return json.loads(re.search(r'id="explorer-server">(.*?)</script>', page)[1])


def test_the_page_is_told_of_the_sizes_and_may_ask_its_server_alone(client, sizes):
    page = client.get("/").text
    said = told(page)
    assert [size["name"] for size in said["sizes"]] == ["keep-0.8", "keep-0.4"]  # the largest first
    assert [size["bytes"] for size in said["sizes"]] == [size.run.bytes_after for size in sizes]
    assert (said["page"], said["asks"], said["chat"], said["original"]) == ("keep-0.8", True, True, "tiny")
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1]
    assert policy.startswith("default-src 'none'; connect-src 'self';")
    other = client.get("/", params={"size": "keep-0.4"}).text
    assert told(other)["page"] == "keep-0.4"
    assert client.get("/", params={"size": "absent"}).status_code == 404
    assert "connect-src" not in (sizes[0].folder / "report.html").read_text(encoding="utf-8")


def test_the_page_is_in_the_language_that_is_asked_for(sizes):
    assert '<html lang="es">' in client_of(app_of(sizes, lang="es")).get("/").text
    with pytest.raises(TwofoldError, match="there is no language 'fr'"):
        explore(sizes[0].folder, lang="fr")


def test_only_data_of_the_stored_page_comes_into_the_served_one(runs, tmp_path):
    folder = shutil.copytree(runs / "sizes" / "keep-0.4", tmp_path / "<img src=x onerror=alert(1)>")
    live = {"version": 1, "model": "</script><script>alert(2)</script>"}
    stored = f'<script>alert(3)</script><script type="application/json" id="explorer-data">{embedded(live)}</script>'
    (folder / "report.html").write_text(stored, encoding="utf-8")
    page = client_of(app_of(find_sizes(folder))).get("/").text
    assert "alert(3)" not in page and "<script>alert" not in page and "<img src=x" not in page
    assert json.loads(re.search(r'id="explorer-data">(.*?)</script>', page)[1]) == live
    assert told(page)["sizes"][0]["name"] == folder.name
    for odd in ("no page", '<script type="application/json" id="explorer-data">[1]</script>'):
        (folder / "report.html").write_text(odd, encoding="utf-8")
        assert "explorer-data" not in re.sub(r"(?s)<script>.*", "", client_of(app_of(find_sizes(folder))).get("/").text)


@pytest.mark.parametrize(
    ("query", "host"),
    [
        ("", f"127.0.0.1:{PORT}"), ("?token=", f"127.0.0.1:{PORT}"), ("?token=t0ke", f"127.0.0.1:{PORT}"),
        ("?token=tökén", f"127.0.0.1:{PORT}"), (f"?token={TOKEN}&token=x", f"127.0.0.1:{PORT}"),
        (f"?token={TOKEN}", f"evil.example:{PORT}"), (f"?token={TOKEN}", "127.0.0.1:9"), (f"?token={TOKEN}", "127.0.0.1"),
    ],
)  # fmt: skip
def test_without_the_token_and_at_another_address_the_door_is_closed(sizes, query, host):
    door = TestClient(app_of(sizes), base_url=f"http://127.0.0.1:{PORT}")
    for path in ("/", "/absent", "/docs"):
        closed = door.get(path + query, headers={"host": host})
        assert closed.status_code == 403 and "twofold explore" in closed.text
    assert door.post("/read" + query, headers={"host": host}, json=asked()).status_code == 403


def test_with_the_token_the_door_is_open_and_the_address_goes_nowhere(client):
    opened = client.get("/", headers={"host": f"LOCALHOST:{PORT}"})
    assert opened.status_code == 200
    assert opened.headers["referrer-policy"] == "no-referrer" and opened.headers["cache-control"] == "no-store"
    assert opened.headers["x-frame-options"] == "DENY"
    assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404


def both(runs):
    load = AutoModelForCausalLM.from_pretrained
    return load(runs / "tiny").eval(), load(runs / "sizes" / "keep-0.4").eval()


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_is_read_as_transformers_reads_it(client, runs, chat):
    said = client.post("/read", json=asked(chat=chat)).json()
    tokenizer = AutoTokenizer.from_pretrained(runs / "tiny")
    ids = tokenizer(f"Q: {TEXT}\nA:" if chat else TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        dense, factored = (torch.log_softmax(model(ids).logits[0], -1) for model in both(runs))
    apart = torch.nn.functional.kl_div(factored, dense, reduction="none", log_target=True).sum(-1)
    count = ids.shape[1]
    assert len(said["tokens"]) == count and "divergence" not in said["tokens"][0]
    assert [token["divergence"] for token in said["tokens"][1:]] == pytest.approx(apart[:-1].tolist(), abs=1e-5)
    assert said["mean"] == pytest.approx(float(apart[:-1].mean()), abs=1e-5) and said["mean"] > 1e-3
    assert said["next"]["divergence"] == pytest.approx(float(apart[-1]), abs=1e-5)
    own = dense[:-1].gather(1, ids[0, 1:, None])[:, 0].exp()
    assert [token["dense"] for token in said["tokens"][1:]] == pytest.approx(own.tolist(), abs=1e-6)
    assert said["same"] == int((dense[:-1].argmax(-1) == factored[:-1].argmax(-1)).sum())
    candidates = said["next"]["candidates"]
    assert 8 <= len(candidates) <= 16
    assert [one["dense"] for one in candidates[:1]] == pytest.approx([float(dense[-1].exp().max())], abs=1e-6)
    assert max(one["factored"] for one in candidates) == pytest.approx(float(factored[-1].exp().max()), abs=1e-6)


def test_a_model_beside_itself_is_not_apart(sizes):
    said = client_of(app_of(sizes, against=str(sizes[1].folder))).post("/read", json=asked()).json()
    assert {token["divergence"] for token in said["tokens"][1:]} == {0.0} and said["next"]["divergence"] == 0
    assert said["same"] == len(said["tokens"]) - 1


def test_answers_are_the_greedy_ones(client, runs):
    said = client.post("/answer", json=asked()).json()
    tokenizer = AutoTokenizer.from_pretrained(runs / "tiny")
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    for name, model in zip(("dense", "factored"), both(runs), strict=True):
        out = model.generate(ids, do_sample=False, max_new_tokens=ANSWER)
        assert said[name] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert said["dense"] != said["factored"]


@pytest.mark.parametrize(
    ("body", "key", "words"),
    [
        (asked(text=" \n"), "served.empty", "no text"),
        (asked(text="x" * 89), "served.long", "89 tokens, and 88 can be compared"),
        (asked(size="../keep-0.4"), "served.size", "../keep-0.4"),
        (asked(more=1), "served.unreadable", "can't be read"),
        (asked(text=3), "served.unreadable", "can't be read"),
    ],
)
def test_what_can_not_be_asked_is_said_in_a_sentence(client, body, key, words):
    for path in ("/read", "/answer"):
        refused = client.post(path, json=body)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["key"] == key and words in error["message"]
    assert client.post("/read", content=b"\xff").json()["error"]["key"] == "served.unreadable"


def test_another_vocabulary_a_missing_template_and_overflow_are_said(runs, sizes, tmp_path):
    other = shutil.copytree(runs / "tiny", tmp_path / "other")
    model = make_model()
    model.resize_token_embeddings(300)
    model.save_pretrained(other)
    with pytest.raises(RefusedError, match=r"predicts 300 tokens and this size 264.*--against"):
        find_models(sizes, str(other), HOW).read("keep-0.4", "ab", False)
    models = find_models(sizes, None, HOW)
    models.read("keep-0.4", "ab", False)
    models.factored[1].tokenizer.chat_template = None
    with pytest.raises(RefusedError, match="The chat template refuses this"):
        models.read("keep-0.4", "ab", True)
    models.factored[1].model.lm_head.weight.data *= float("inf")
    with pytest.raises(RefusedError, match="overflow"):
        models.read("keep-0.4", "ab", False)


def test_no_code_of_a_checkpoint_is_run(runs, sizes, tmp_path):
    own = shutil.copytree(runs / "tiny", tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Model"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    refused = client_of(app_of(sizes, against=str(own))).post("/read", json=asked()).json()["error"]
    assert refused["key"] == "served.code" and "runs none" in refused["message"]
    assert not (tmp_path / "ran").exists()


def test_models_run_one_at_a_time_and_are_loaded_once(sizes, monkeypatch):
    inside, most, loaded = 0, 0, []
    predictions, load = models_file._predictions, models_file.load_model

    def slowly(*given):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        inside -= 1
        return predictions(*given)

    monkeypatch.setattr(models_file, "_predictions", slowly)
    monkeypatch.setattr(models_file, "load_model", lambda name, **how: loaded.append(name) or load(name, **how))
    models = find_models(sizes, None, HOW)
    assert not loaded
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda _: models.read("keep-0.4", TEXT, False), range(4)))
    assert most == 1 and len(loaded) == 2 and all(one == said[0] for one in said)
    models.read("keep-0.8", TEXT, False)
    assert loaded[2:] == [str(sizes[0].folder)]


def test_a_full_queue_is_said(sizes, monkeypatch):
    app, held = app_of(sizes), threading.Event()
    monkeypatch.setattr(models_file, "_predictions", lambda *_: held.wait(10) and pytest.fail("not reached"))
    app.app.inside = QUEUE
    assert client_of(app).post("/read", json=asked()).status_code == 503


def test_runs_that_are_no_language_models_have_the_page_alone(sizes, capsys):
    speech = [replace(size, run=size.run.model_copy(update={"task": "speech"})) for size in sizes]
    client = client_of(app_of(speech))
    assert "texts are for language models, and this run is for speech" in capsys.readouterr().err
    said = told(client.get("/").text)
    assert not said["asks"] and said["task"] == "speech"
    assert client.post("/read", json=asked()).status_code == 404


def test_a_fault_of_ours_is_no_silence(sizes, monkeypatch, capsys):
    monkeypatch.setattr(Models, "read", lambda *_: 1 // 0)
    failed = client_of(app_of(sizes)).post("/read", json=asked())
    assert failed.status_code == 500 and "division" in failed.json()["error"]["message"]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_folder_of_several_originals_of_none_or_of_a_broken_record_is_refused(runs, tmp_path):
    with pytest.raises(TwofoldError, match="there is no folder"):
        explore(tmp_path / "absent")
    with pytest.raises(TwofoldError, match="no compressed model in"):
        explore(runs / "tiny")
    several = shutil.copytree(runs / "sizes", tmp_path / "several")
    record = json.loads((several / "keep-0.4" / "run.json").read_text())
    record["recipe"]["model"] = "elsewhere"
    (several / "keep-0.4" / "run.json").write_text(json.dumps(record))
    with pytest.raises(TwofoldError, match=r"several originals \(.*tiny, elsewhere\)"):
        explore(several)
    with pytest.raises(TwofoldError, match=r"the original of keep-0\.4 is not there: .*give it by `against`"):
        record["recipe"]["model"] = "./elsewhere"
        (several / "keep-0.4" / "run.json").write_text(json.dumps(record))
        explore(several / "keep-0.4")
    (several / "keep-0.4" / "run.json").write_text("{}")
    with pytest.raises(TwofoldError, match="is not the record of a compression"):
        explore(several)


def test_a_missing_package_is_named(runs, monkeypatch):
    monkeypatch.setattr(
        "twofold.serving.server.importlib.util.find_spec", lambda name: None if name == "fastapi" else 1
    )
    with pytest.raises(TwofoldError, match=r"twofold explore needs fastapi, .*pip install 'twofold\[serve\]'"):
        explore(runs / "sizes")


def command(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["twofold", "explore", *map(str, words)])
    twofold.cli.main()


def test_the_command_prints_the_address_that_it_serves(runs, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: served.append((self.config.app, sockets[0])))
    with pytest.raises(SystemExit, match="0"):
        command(monkeypatch, runs / "sizes" / "keep-0.4", "--port", 0)
    (app, place), printed = served[0], capsys.readouterr().out
    url, token = re.search(r"Exploring keep-0\.4 at (http://127\.0\.0\.1:\d+)/\?token=(\S{32}) ", printed).groups()
    assert place.getsockname() == ("127.0.0.1", int(url.rsplit(":", 1)[1]))
    place.close()
    client = TestClient(app, base_url=url)
    assert client.get("/").status_code == 403
    assert client.get(f"/?token={token}").status_code == 200


def test_a_port_in_use_is_said_and_ends_with_2(runs, monkeypatch, capsys):
    with socket.socket() as taken, pytest.raises(SystemExit, match="2"):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command(monkeypatch, runs / "sizes", "--port", port)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"twofold: can't listen at 127.0.0.1:{port} (") and said.endswith("name another --port")


def test_what_is_ruled_out_counts_nothing_and_what_the_other_rules_out_is_infinite():
    first = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]).log()
    second = torch.tensor([[0.25, 0.75, 0.0], [0.0, 1.0, 0.0]]).log()
    apart = divergences(first, second)
    assert float(apart[0]) == pytest.approx(0.5 * (math.log(2) + math.log(2 / 3)), abs=1e-6)
    assert float(apart[1]) == float("inf")


def test_pieces_join_to_the_text():
    tokenizer = make_tokenizer()
    ids = tokenizer("a b\n<c>")["input_ids"]
    assert "".join(piece(tokenizer, before, i) for before, i in zip([None, *ids], ids, strict=False)) == "a b\n<c>"
    first, second = tokenizer("á")["input_ids"]
    assert (piece(tokenizer, None, first), piece(tokenizer, first, second)) == (f"\ufffd{first}", f"\ufffd{second}")
