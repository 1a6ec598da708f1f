"""Folders, rows and data sets give the same records, each with its place; what can't be read is named, or counted."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Audio, Dataset, Features, Value

from clips import RATE, image_bytes, lines, picture, put, tone, wave_bytes
from twofold.errors import TwofoldError
from twofold.recipe import make_recipe
from twofold.task.data.audio import load_audio
from twofold.task.data.columns import Record
from twofold.task.data.images import load_image
from twofold.task.data.records import given_records, made_of, read_records
from twofold.task.data.settings import Records
from twofold.task.text.row import Tally

CLIPS = {f"{i}.wav": wave_bytes(tone(hertz=200.0 * (i + 1))) for i in range(3)}
WORDS = [{"file": name, "text": f"words of {name}"} for name in CLIPS]


def read(*names: Path, kind: Any = "audio", tally: Tally | None = None, **settings: Any) -> list[Record]:
    return list(read_records(names, Records(**settings), kind=kind, tally=tally or Tally()))


def texts(records: list[Record]) -> list[Any]:
    return [record.fields.get("text") for record in records]


def sounds(records: list[Record]) -> list[Any]:
    return [load_audio(record.need("audio"), RATE) for record in records]


def table(rows: list[dict[str, str]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def test_a_folder_is_read_in_turns_and_what_is_left_of_it_is_counted(tmp_path):
    put(
        tmp_path,
        {"b/2.wav": b"x", "a.flac": b"x", "a.WAV": b"x", "notes.md": "x", ".hidden.wav": b"x", "b/.git/x.wav": b"x"},
    )
    tally = Tally()
    records = read(tmp_path, tally=tally)
    assert [record.place for record in records] == [str(tmp_path / name) for name in ("a.WAV", "b/2.wav", "a.flac")]
    assert not any("label" in record.fields for record in records)
    assert tally.sentences == ["files of folders that are not read: '.md' (of 1)"]


def test_folders_of_folders_are_labels_and_take_turns(tmp_path):
    put(
        tmp_path,
        {f"{label}/{i}.png": image_bytes() for label in ("cat", "dog") for i in range(3)} | {"dog/9.jpg": b"x"},
    )
    records = read(tmp_path, kind="image")
    assert [(r.fields["label"], Path(r.place).name) for r in records] == [
        ("cat", "0.png"), ("dog", "0.png"), ("cat", "1.png"), ("dog", "1.png"), ("cat", "2.png"), ("dog", "2.png"),
        ("dog", "9.jpg"),
    ]  # fmt: skip
    assert load_image(records[0].need("image")).size == picture().size


@pytest.mark.parametrize("sidecar", ["words.jsonl", "metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_sidecar_says_what_the_files_of_a_folder_are(sidecar, tmp_path):
    rows = [{"file_name" if sidecar != "words.jsonl" else "file": row["file"], "text": row["text"]} for row in WORDS]
    put(tmp_path, {f"sub/{name}": clip for name, clip in {**CLIPS, "unnamed.wav": wave_bytes()}.items()})
    if sidecar.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(tmp_path / "sub" / sidecar)
    else:
        put(tmp_path, {f"sub/{sidecar}": table(rows) if sidecar.endswith(".csv") else lines(rows)})
    for folder in (tmp_path, tmp_path / "sub"):
        tally = Tally()
        records = read(folder, tally=tally)
        assert texts(records) == [row["text"] for row in WORDS]
        for sound, clip in zip(sounds(records), CLIPS.values(), strict=True):
            np.testing.assert_array_equal(sound, load_audio(clip, RATE))
        assert tally.sentences == ["files of folders that are not read: '.wav' (of 1)"]


def test_rows_and_data_sets_give_the_same_clips(tmp_path):
    put(tmp_path, {f"clips/{name}": clip for name, clip in CLIPS.items()})
    rows = [{"audio": f"clips/{row['file']}", "text": row["text"]} for row in WORDS]
    put(tmp_path, {"rows.jsonl": lines(rows), "rows.csv": table(rows), "rows.json": lines(rows)})
    features = Features({"audio": Audio(sampling_rate=RATE), "text": Value("string")})
    held = [{"audio": {"bytes": CLIPS[row["file"]], "path": row["file"]}, "text": row["text"]} for row in WORDS]
    made = Dataset.from_list(held).cast(features)
    made.to_parquet(tmp_path / "rows.parquet")
    made.to_parquet(tmp_path / "set" / "train.parquet")
    made.save_to_disk(tmp_path / "kept")
    arrays = [{"audio": {"array": tone(hertz=200.0 * (i + 1)).tolist(), "sampling_rate": RATE}, "text": row["text"]}
              for i, row in enumerate(WORDS)]  # fmt: skip
    put(tmp_path, {"arrays.jsonl": lines(arrays)})
    expected = [load_audio(clip, RATE) for clip in CLIPS.values()]
    names = ("rows.jsonl", "rows.csv", "rows.json", "rows.parquet", "set", "kept", "arrays.jsonl", "clips/*.wav")
    for name in names:
        records = read(tmp_path / name)
        assert len(records) == 3 and ("*" in name or texts(records) == [row["text"] for row in WORDS]), name
        for sound, known in zip(sounds(records), expected, strict=True):
            np.testing.assert_array_equal(sound, known)


def test_values_from_python_are_records_too(tmp_path):
    path = put(tmp_path, CLIPS) / "0.wav"
    values = [path, str(path), CLIPS["0.wav"], {"bytes": CLIPS["0.wav"]}, load_audio(path, RATE), {"audio": path},
              {"array": load_audio(path, RATE), "sampling_rate": RATE}, {"clip": str(path)}]  # fmt: skip
    records = list(given_records(values[:-1], Records(), kind="audio", tally=Tally()))
    records += given_records(values[-1:], Records(audio_column="clip"), kind="audio", tally=Tally())
    assert [record.place for record in records[:2]] == ["sample 1", "sample 2"] and len(records) == 8
    for sound in sounds(records):
        np.testing.assert_array_equal(sound, load_audio(path, RATE))
    pairs = [("one", "two"), ["one", "two"], {"source": "one", "target": "two"}]
    for record in given_records(pairs, Records(), kind="text", tally=Tally()):
        assert (record.need("text"), record.need("target")) == ("one", "two")
    with pytest.raises(
        TwofoldError, match="sample 1: its text, 'text', must be a text or a list of words, it holds a number"
    ):
        list(given_records([3], Records(), kind="text", tally=Tally()))
    (image,) = given_records([picture()], Records(), kind="image", tally=Tally())
    assert load_image(image.need("image")).size == picture().size


TEXTS = {
    "text": ({"text": "a", "label": 1}, {}),
    "source": ({"source": "a", "target": "b"}, {}),
    "sentence1": ({"sentence1": "a", "sentence2": "b", "score": 2.5}, {}),
    "question": ({"question": "a", "answer": "b"}, {}),
    "named": ({"en": "a", "de": "b", "text": "c"}, {"text_column": "en", "target_column": "de"}),
    "translation": ({"translation": {"en": "a", "de": "b"}}, {"text_column": "en", "target_column": "de"}),
    "dots": (
        {"translation": {"en": "a", "de": "b"}},
        {"text_column": "translation.en", "target_column": "translation.de"},
    ),
    "words": ({"tokens": ["a", "b"], "ner_tags": [0, 1]}, {}),
}


@pytest.mark.parametrize("name", TEXTS)
def test_fields_are_found_by_their_usual_names_or_by_those_that_are_given(name, tmp_path):
    row, columns = TEXTS[name]
    (record,) = read(put(tmp_path, {"a.jsonl": lines([row])}) / "a.jsonl", kind="text", **columns)
    assert record.need("text") == (["a", "b"] if name == "words" else "a")
    assert record.fields.get("target") == (None if name in ("text", "words") else "b")
    assert record.fields.get("label") == {"text": 1, "sentence1": 2.5, "words": [0, 1]}.get(name)


def test_a_text_file_has_one_on_each_line_and_folders_are_labels(tmp_path):
    put(tmp_path, {"pos/a.txt": "one\n\n two \n", "neg/b.txt": "three"})
    records = read(tmp_path, kind="text")
    assert [(r.fields["label"], r.need("text")) for r in records] == [("neg", "three"), ("pos", "one"), ("pos", "two")]
    assert records[2].place == f"{tmp_path}/pos/a.txt, line 3"
    assert texts(read(tmp_path / "pos" / "a.txt", kind="text")) == ["one", "two"]


def test_fields_that_are_not_read_are_told(tmp_path):
    tally = Tally()
    read(
        put(tmp_path, {"a.jsonl": lines([{"text": "a", "speaker": 3}, {"text": "", "speaker": 4}])}) / "a.jsonl",
        kind="text",
        tally=tally,
    )
    assert tally.sentences == ["1 rows without any text left out", "fields of rows that are not read: 'speaker' (of 1)"]


BAD = {
    "no field": ({"a": 1, "b": 2}, {}, r"a.jsonl, line 1: there is no audio in it: its fields are a, b; name the field with its "
                 r"audio by `audio_column`; mend the row"),
    "no such field": ({"a": 1}, {"audio_column": "c"}, r"there is no 'c' in it: its fields are a; .* by `audio_column`"),
    "no row": ([1], {}, "a row must be a JSON object, this is a list"),
    "no text": ({"audio": "0.wav", "said": 3}, {"text_column": "said"}, "its text, 'said', must be a text .* it holds a number"),
    "many fields": ({f"f{i}": 1 for i in range(12)}, {}, "its fields are f0, f1, f2, f3, f4, f5, f6, f7 and 4 more;"),
    "languages": ({"translation": {"en": "a", "de": "b"}}, {}, "its fields are translation.en, translation.de;"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_or_counted(name, tmp_path):
    row, columns, words = BAD[name]
    kind = "text" if name == "languages" else "audio"
    good = {"audio": "0.wav", "text": "words"} | dict.fromkeys(columns.values(), "words")
    path = put(tmp_path, {"a.jsonl": lines([row, good]), **CLIPS}) / "a.jsonl"
    with pytest.raises(TwofoldError, match=words):
        read(path, kind=kind, **columns)
    tally = Tally()
    assert len(read(path, kind=kind, tally=tally, skip_bad=True, **columns)) == 1
    assert tally.skipped == 1 and "line 1" in tally.sentences[0]


def test_a_bad_file_is_named_or_counted(tmp_path):
    put(tmp_path, {**CLIPS, "1.wav": CLIPS["1.wav"][:100], "3.wav": wave_bytes(np.zeros(9, np.float32))})

    def make(record: Record) -> Any:
        return load_audio(record.need("audio"), RATE)

    tally = Tally()
    records = read(tmp_path)
    with pytest.raises(TwofoldError, match=r"1.wav: the file is cut short: .*; mend the file or take it away"):
        list(made_of(records, make, tally=tally, skip_bad=False))
    assert len(list(made_of(records, make, tally=tally, skip_bad=True))) == 2
    assert tally.skipped == 2 and tally.sentences[0].startswith("2 bad rows skipped (first: ")
    with pytest.raises(
        TwofoldError, match=r'0.wav: there is no text for it; put rows with "file" and "text" into words.jsonl'
    ):
        list(made_of(records, lambda record: record.need("text"), tally=tally, skip_bad=False))


def test_pairs_without_a_target_are_told(tmp_path):
    put(tmp_path, {"a.jsonl": lines([{"text": "a", "german": "b"}, {"text": "a", "target": " ", "x": ""}])})
    records = read(tmp_path / "a.jsonl", kind="text")
    with pytest.raises(
        TwofoldError, match=r"line 1: there is no target in it: its other fields are german; .* `target_column`"
    ):
        list(made_of(records, lambda record: record.need("target"), tally=Tally(), skip_bad=False))
    assert "target" not in records[1].fields


@pytest.mark.parametrize(
    ("files", "name", "kind", "words"),
    [
        ({"a.txt": "x"}, "", "audio", r"is a folder without any file of audio \(.wav, .flac, .mp3, .ogg\); name the folder"),
        ({"a.jsonl": "{}"}, "", "text", r"without any file of text \(.txt\); name the files in it, as in .*/\*.jsonl"),
        ({"a.txt": "x"}, "a.txt", "audio", "a.txt is a text; name a folder with files of audio"),
        ({"a.jsonl": ""}, "a.jsonl", "image", "there are no records of image in .*; name a folder of .png or .jpg"),
        ({"a.jsonl": lines([{"text": " "}])}, "a.jsonl", "text", "but 1 without any text; name a file of texts"),
        ({"a.parquet": "no"}, "a.parquet", "audio", "is not a table in Parquet that can be read"),
        ({}, "none.wav", "audio", "there is no file .*none.wav; check the path"),
        ({}, "*.wav", "audio", r"no file matches .*\*.wav"),
    ],
)  # fmt: skip
def test_sources_without_a_record_are_told(files, name, kind, words, tmp_path):
    put(tmp_path, files)
    with pytest.raises(TwofoldError, match=words):
        read(tmp_path / name, kind=kind)


def test_the_settings_are_those_of_the_recipe():
    recipe = make_recipe({"model": "m", "keep": 0.5, "samples": 12, "audio_column": "clip", "skip_bad": True})
    part = recipe.part(Records)
    assert (part.samples, part.audio_column, part.skip_bad, part.image_column) == (12, "clip", True, "image")
    with pytest.raises(TwofoldError, match=r"`samples`: .*greater than or equal to 1"):
        make_recipe({"model": "m", "keep": 0.5, "samples": 0})
