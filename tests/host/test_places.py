"""Places as people have them: files in the way, no home, full disks, closed streams; one sentence, exit code 2."""

from __future__ import annotations

import errno
import io
import os
import resource
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

import twofold
import twofold.cli
from conftest import TEXT, make_model
from twofold.cli.streams import CUT_OFF, give_streams
from twofold.host.cache import cache_folder
from twofold.host.files import lock_of, make_folder, write_text
from twofold.host.folders import check_output, check_space, staged_folder
from twofold.planning.plan import Plan

RUN = ("--calibration", "{text}", "--tokens", 96, "--window", 32, "--eval-windows", 0, "--quiet")
COMMANDS = {
    "compress": ("compress", "{model}", "--keep", 0.5, *RUN, "--out", "{out}"),
    "plan": ("plan", "{model}", "--keep", 0.5, "--quiet", "--out", "{out}"),
    "export": ("export", "{model}", "--to", "dense", "--quiet", "--out", "{out}"),
    "merge": ("merge", "{model}", "{model}", "--out", "{out}"),
    "extract": ("extract", "{model}", "--base", "{model}", "--rank", 2, "--quiet", "--out", "{out}"),
    "tune": ("tune", "{model}", "--data", "{text}", "--quiet", "--out", "{out}"),
    "bench": ("bench", "{model}", "--out", "{out}"),
}
PLACES = {
    "below a file": "{text}/x",
    "far below a file": "{text}/x/y/z",
    "in no file system": "/proc/none/x",
    "a file": "{text}",
    "of too long a name": "{folder}/" + "a" * 240,
}


@pytest.fixture
def run(capsys, monkeypatch, checkpoint, text_file, tmp_path):
    """Run a command in this process, with the places of the test: (exit code, standard output, standard error)."""

    def call(*arguments: object, **places: object) -> tuple[int, str, str]:
        named = {"model": checkpoint, "text": text_file, "folder": tmp_path, "out": tmp_path / "out", **places}
        monkeypatch.setattr(sys, "argv", ["twofold", *(str(argument).format(**named) for argument in arguments)])
        code: object = 0
        try:
            twofold.cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        return code, *capsys.readouterr()  # type: ignore[return-value]

    return call


def refused(result: tuple[int, str, str], word: str) -> None:
    code, _, said = result
    assert code == 2 and said.count("\n") == 1 and said.startswith("twofold: ") and word in said, (code, said)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_can_not_be_made_is_told_before_any_work(command, place, run, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("twofold.model.load.locate", None)  # whoever looks at the model has begun
    out = PLACES[place].format(text=text_file, folder=tmp_path)
    before = sorted(tmp_path.iterdir())
    refused(run(*COMMANDS[command], out=out), Path(out).name[:20])
    assert sorted(tmp_path.iterdir()) == before and text_file.read_text() == TEXT


def test_a_plan_replaces_plans_alone(run, text_file, tmp_path):
    out = tmp_path / "plan.json"
    for _ in range(2):
        assert run(*COMMANDS["plan"], out=out)[0] == 0
    assert Plan.load(out).entries
    refused(run(*COMMANDS["plan"], out=text_file), "is no plan, so it is not replaced")
    refused(run(*COMMANDS["plan"], out=tmp_path), "is a folder; name a file")


@pytest.mark.parametrize("cache", ["{text}", "{text}/x", "/proc/none/twofold"])
def test_a_cache_that_can_not_be_made_is_told(cache, run, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("TWOFOLD_CACHE", cache.format(text=text_file))
    refused(run("inspect", "smollm2"), "TWOFOLD_CACHE")
    refused(run(*COMMANDS["compress"]), "TWOFOLD_CACHE")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_cache_without_a_home_is_told(monkeypatch):
    for variable in ("TWOFOLD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a name and a home
    with pytest.raises(twofold.TwofoldError, match="name a folder with TWOFOLD_CACHE"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/twofold")


def test_a_user_without_a_name_gets_a_lock(tmp_path, monkeypatch):
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: (_ for _ in ()).throw(KeyError(number)))
    with lock_of(tmp_path):
        pass


def test_no_place_for_temporary_files_is_told(tmp_path, monkeypatch):
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    with pytest.raises(twofold.TwofoldError, match="TMPDIR"):
        lock_of(tmp_path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR])
def test_what_a_disk_refuses_is_told_by_what_helps(number, tmp_path, monkeypatch):
    """Free space where it is full, another place where it is not."""

    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    helps = "free some space" if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "name another place"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", refuse)
        for attempt in (
            lambda: make_folder(tmp_path / "x"),
            lambda: write_text(tmp_path / "x" / "y", ""),
        ):
            with pytest.raises(twofold.TwofoldError, match=helps):
                attempt()
        for attempt in (
            lambda: check_output(tmp_path / "x", False),
            lambda: check_space(tmp_path / "x", 1),
            lambda: staged_folder(tmp_path / "x").__enter__(),
        ):
            with pytest.raises(twofold.TwofoldError, match="name another place"):
                attempt()
    with pytest.raises(twofold.TwofoldError, match=helps), staged_folder(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    assert not list(tmp_path.glob("**/x*"))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EMFILE])
def test_what_nobody_has_put_in_words_is_no_failure_of_ours(number, run, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), "/the/place")

    monkeypatch.setattr("twofold.inspect", refuse)
    refused(run("inspect", "{model}"), "/the/place can't be used")


def test_files_larger_than_the_limit_are_a_full_disk(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(twofold.TwofoldError, match="no space left while writing"):
            write_text(tmp_path / "x", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_closed_streams_are_the_null_device(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert run("chat", "{model}")[0] == 0
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    give_streams()
    print("nobody reads this", file=sys.stdout)
    assert sys.stdin.read() == "" and not sys.stderr.isatty()


def test_an_encoding_without_our_letters_replaces_them(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    give_streams()
    print("80 × 32 →", flush=True)
    assert written.getvalue() == b"80 ? 32 ?\n"


@pytest.mark.parametrize(
    "how", [["inspect", "{model}", "--json"], ["inspect", "{model}"], ["compress", "--help"], ["--help"]]
)
def test_output_that_nobody_reads_ends_the_command_quietly(how, checkpoint, tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "argv", ["twofold", *(word.format(model=checkpoint) for word in how)])
    with open(writer, "w") as out, (tmp_path / "said").open("w") as said:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", said)
        with pytest.raises(SystemExit) as stopped:
            twofold.cli.main()
        monkeypatch.undo()
    assert stopped.value.code == CUT_OFF and (tmp_path / "said").read_text() == ""


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("command", [("inspect", "{model}"), ("compress", "--help"), COMMANDS["merge"]])
def test_a_standard_output_that_takes_nothing_is_told_with_the_place_of_the_result(
    command, through, run, checkpoint, tmp_path, monkeypatch
):
    model, adapter = make_model(), tmp_path / "adapter"
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    command = [adapter if number == 2 and command[0] == "merge" else word for number, word in enumerate(command)]
    with open("/dev/full", "wb", buffering=0) as full:  # noqa: PTH123
        out = io.TextIOWrapper(full if through else io.BufferedWriter(full), write_through=through)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            result = run(*command)
    refused(result, "the standard output can't be written (No space left on device)")
    assert command[0] != "merge" or f"look into {tmp_path / 'out'} for the result" in result[2]
    assert command[0] != "merge" or (tmp_path / "out" / "model.safetensors").is_file()


def test_a_place_that_the_environment_names_is_told_by_its_variable(run, tmp_path, monkeypatch):
    def missing(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(tmp_path / "none" / "kernels"))

    monkeypatch.setattr("twofold.inspect", missing)
    assert run("inspect", "{model}")[0] == 1, "a file that is missing may be our fault"
    monkeypatch.setenv("SOME_LIBRARYS_CACHE", str(tmp_path / "none"))
    refused(run("inspect", "{model}"), "SOME_LIBRARYS_CACHE names it")


def test_an_empty_text_is_told_before_the_window(run, tmp_path):
    (tmp_path / "empty.txt").touch()
    refused(run("evaluate", "{model}", "--text", "{folder}/empty.txt", "--quiet"), "the evaluation text is empty")
    refused(run("evaluate", "{model}", "--text", "{text}", "--quiet"), "--window 1024 is longer")


def test_a_memory_that_is_none_is_told_as_one(run):
    for memory in ("foo", "70%", "90M"):
        refused(run(*COMMANDS["plan"], "--memory", memory), "--memory must be a size in bytes")


def test_letters_of_any_script_and_a_home_are_places(run, checkpoint, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    place = tmp_path / "größe ñ 中"
    place.mkdir()
    assert run(*COMMANDS["plan"], model=checkpoint.rename(place / "módel"), out=place / "plån.json")[0] == 0
    assert Plan.load(place / "plån.json").entries
    assert run("plan", place / "módel", "--keep", 0.5, *RUN, "--out", "~/here.json", text="~/texts.txt")[0] == 0
    assert (tmp_path / "here.json").is_file()
