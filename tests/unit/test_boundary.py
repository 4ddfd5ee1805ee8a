"""The boundary of the command line: every fault ends with a message that names it, and the right exit code."""

import ast
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import moe_vision
from moe_vision import files
from moe_vision.cli import boundary
from moe_vision.data.records import load_records
from moe_vision.evaluation import EvalReport
from moe_vision.files import FileError, WriteError, give_usual_modes, read_json, read_text, write_text
from moe_vision.modeling.model_config import packaged_config
from moe_vision.terminal import headline, say
from moe_vision.viz.tables import accuracy_table
from tests.tiny import tiny_values
from tests.unit.test_cli import run

CASES = Path(__file__).parents[1] / "cases"
NAMES = ["[/x]", "[bold]x", "[bold]x[/bold]", ":smile:", "a[b", "\\[x]", "[link=file:///etc]x[/link]"]


def faulty(error: BaseException) -> Callable[[], None]:
    def raises() -> None:
        raise error

    return raises


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("a fault"), 2, "error: a fault"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "'/x/y': No space left on device: make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "'/x': Permission denied: check the permissions"),
        (WriteError(errno.ENOSPC, "report '/x' cannot be written: make room"), 2, "error: report '/x' cannot"),
        (RuntimeError("odd\nthing [/x]"), 1, "unexpected RuntimeError in `moe-vision show`: odd thing [/x]; hint: run"),
        (KeyError("key"), 1, "unexpected KeyError in `moe-vision show`: 'key'"),
        (RecursionError("deep"), 1, "unexpected RecursionError"),
        (MemoryError(), 2, "not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
    ],
)
def test_each_kind_of_exception_has_its_message_and_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, error: BaseException, code: int, said: str
) -> None:
    monkeypatch.setattr(boundary, "app", faulty(error))
    found, out, err = run(monkeypatch, capsys, "show")
    assert found == code and out == "" and said in err and "Traceback" not in err and len(err.splitlines()) <= 1


def test_commands_that_are_interrupted_say_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("moe_vision.cli.configs.schedule_class", lambda path: faulty(KeyboardInterrupt())())
    code, _, err = run(monkeypatch, capsys, "show", "x.yaml")
    assert code == 130 and err == "interrupted\n"


@pytest.mark.parametrize(
    "kind", ["folder", "pipe", "device", "loop", "link to a pipe", "missing", "latin-1", "long", "zero byte"]
)
def test_a_file_that_is_no_readable_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    elif kind == "latin-1":
        path.write_bytes(b'{"a": "\xe9"}')
    elif kind == "long":
        path = tmp_path / ("x" * 300)
    elif kind == "zero byte":
        path = tmp_path / "a\0b"
    with pytest.raises(FileError) as caught:
        read_text(path, "config")
    assert str(path) in str(caught.value) and ": " in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[1]", "null", "3", "{", "[" * 100_000, '{"a": ' * 100_000, "9" * 9999, '{"a": 1}}']
)
def test_json_of_a_wrong_kind_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(FileError, match=r"^metrics '.*m\.json' (is not|holds|is nested)"):
        read_json(tmp_path / "m.json", "metrics")


@pytest.mark.parametrize("place", ["show", "train", "compare", "search", "plan"])
def test_commands_do_not_wait_for_pipes(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, place: str
) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    arguments = [place, tmp_path / "pipe.yaml"]
    if place == "plan":
        arguments = ["plan", "10x10", "--config", tmp_path / "pipe.yaml"]
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2 and "is a named pipe; give a regular file" in err


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_literally(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=200)  # as a Python caller may give: with markup
    say(console, name)
    headline(console, name)
    console.print(accuracy_table({name: {name: 0.5}}))
    out = capsys.readouterr().out
    assert out.count(name) == 4


def test_markup_in_a_task_reaches_the_table_literally(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    records = load_records(CASES / "task-markup.json")
    report = EvalReport({record.task: 1.0 for record in records}, 1.0, 1, [])
    monkeypatch.setattr("moe_vision.evaluation.load_on_accelerator", lambda folder: (None, None))
    monkeypatch.setattr("moe_vision.evaluation.evaluate", lambda *a, **k: report)
    code, out, err = run(monkeypatch, capsys, "eval", "[bold]run", CASES / "task-markup.json")
    assert code == 0 and "[/x]" in out and "[bold]run" in out, err


def test_consoles_with_markup_are_made_nowhere() -> None:
    root = Path(moe_vision.__file__).parent
    found = []
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            plain = isinstance(node, ast.Call) and ast.unparse(node.func) == "Console"
            if plain and path.name != "terminal.py" and "quiet" not in ast.unparse(node):
                found.append(f"{path}:{node.lineno}")
            prints = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("console.print", "console.rule"))
            if prints and path.name not in ("terminal.py", "boundary.py"):
                text = node.args and isinstance(node.args[0], (ast.Constant, ast.JoinedStr))
                if text and "markup=False" not in ast.unparse(node):
                    found.append(f"{path}:{node.lineno}")
    assert not found


def test_arguments_that_are_not_utf8_are_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    code, _, err = run(monkeypatch, capsys, "show", os.fsdecode(b"caf\xe9.yaml"))
    assert code == 2 and "argument 2, 'caf\\udce9.yaml', is not UTF-8" in err


def moe(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe_vision", *map(str, arguments)]
    return subprocess.run(command, text=True, check=False, timeout=120, stderr=subprocess.PIPE, **options)


def test_a_full_standard_output_is_named() -> None:
    with open("/dev/full", "w") as full:
        done = moe("--version", stdout=full)
    assert done.returncode == 2 and "standard output or a file failed (No space left" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_closed_pipe_ends_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    done = moe("--version", stdout=write)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


def test_a_terminal_without_unicode_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = moe("plan", "10x10", "--policy", "café", stdout=subprocess.PIPE, env=environment)
    assert done.returncode == 2 and "caf\\xe9" in done.stderr
    code = "from moe_vision.cli.common import print_json; print_json({'a': 'é \\ud800'})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"a": "é \ud800"}


def test_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        WriteError, match=r"report '.*report\.json' cannot be written \(No space left on device\): make room"
    ):
        write_text(path, "after", "report")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("target", [".", "/dev/full", "missing/folder/file"])
def test_an_output_that_is_no_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["schema", "model", "-o", target], ["plan", "9x9", "--policy", "uhd", "--image", target]):
        code, _, err = run(monkeypatch, capsys, *arguments)
        assert code == 2 and f"'{target}' cannot be written" in err


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_get_the_modes_of_the_umask(tmp_path: Path, mask: int) -> None:
    (tmp_path / "folder/inner").mkdir(parents=True, mode=0o700)
    (tmp_path / "folder/inner/file").touch(mode=0o600)
    before = os.umask(mask)
    try:
        give_usual_modes(tmp_path / "folder")
        assert files.umask() == mask
    finally:
        os.umask(before)
    assert (tmp_path / "folder/inner").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "folder/inner/file").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"epochs": float("inf")}, "stages.0.epochs"), ({"epochs": float("nan")}, "stages.0.epochs"),
        ({"epochs": 10**400}, "stages.0.epochs"), ({"max_grad_norm": float("inf")}, "stages.0.max_grad_norm"),
        ({"num_workers": 10**6}, "stages.0.num_workers"), ({"num_workers": -1}, "stages.0.num_workers"),
        ({"data": {"synthetic": "captions", "scenes": 10**12}}, "stages.0.data.scenes"),
        ({"data": {"synthetic": "captions", "scenes": 10**400}}, "stages.0.data.scenes"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    stage = {"name": "a", "train": {"adapters": 1e-3}, "epochs": 1, "data": {"synthetic": "captions", "scenes": 4}}
    values = {"model": tiny_values(), "stages": [stage | change]}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
    code, _, err = run(monkeypatch, capsys, "show", tmp_path / "train.yaml")
    assert code == 2 and f"train.yaml: 1 problem\n  {key} = " in err


def architecture(**values: Any) -> dict[str, Any]:
    return {"language_model": {"architecture": {**tiny_values()["language_model"]["architecture"], **values}}}


@pytest.mark.parametrize(
    "values",
    [{"hidden_size": 96.5}, {"hidden_size": "wide"}, {"hidden_size": -8}, {"hidden_size": 0}, {"hidden_size": 10**14},
     {"num_attention_heads": 0}, {"num_attention_heads": 10**9}, {"num_hidden_layers": 10**9},
     {"num_hidden_layers": -1}, {"vocab_size": [1]}, {"vocab_size": 10**15}, {"rope_theta": {}}, {"model_type": 3},
     {"model_type": "lama"}, {"model_type": ["llama"]}, {"hidden_act": "nothing"}, {"layer_types": 3}],
)  # fmt: skip
def test_architectures_that_cannot_be_built_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, values: dict[str, Any]
) -> None:
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(tiny_values(**architecture(**values))))
    code, _, err = run(monkeypatch, capsys, "show", tmp_path / "model.yaml")
    assert code == 2 and "model.yaml" in err and "language_model.architecture = " in err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("architecture", "language_model.architecture = {'model_type': 'llama', 'hidden_size': 96.5}: architecture of"),
        ("billion-laughs", "holds more than 100,000 values, aliases counted (line 5); use fewer aliases"),
        ("duplicate-keys", "experts = 'experts': is given twice, in line 3 and in line 15"),
        ("plugins-int", "plugins = 3: Input should be a valid list; write a list"),
        ("epochs-inf", "stages.0.epochs = inf: is no finite number; write a number"),
    ],
)
def test_configs_that_ended_in_tracebacks(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, name: str, said: str
) -> None:
    shutil.copy(CASES / f"{name}.yaml", tmp_path)
    shutil.copy(packaged_config("model/micro.yaml"), tmp_path)
    code, _, err = run(monkeypatch, capsys, "show", tmp_path / f"{name}.yaml")
    assert code == 2 and f"{name}.yaml: 1 problem\n  {said}" in err.replace("file = '" + name + ".yaml': ", "")


@pytest.mark.parametrize("name", ["deep.json", "surrogate.json"])
def test_records_that_ended_in_tracebacks(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, name: str
) -> None:
    code, _, err = run(monkeypatch, capsys, "eval", tmp_path, CASES / name)
    assert code == 2 and name in err
