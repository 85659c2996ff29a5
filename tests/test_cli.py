"""The command line: exit codes, streams, one-line errors, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from recipes import HEADS, write_recipe

from surgery import cli

Run = Callable[..., "Result"]


class Result:
    """What one call of the command gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("inspect", folder)`: calls the command in this process."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["surgery", *map(str, arguments)])
        capsys.readouterr()  # what making the models has printed
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, [HEADS])


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def assert_bad_input(result: Result) -> None:
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert result.err.startswith("surgery: error: ")
    assert "Traceback" not in result.err


def imported_by(*arguments: str) -> set[str]:
    """The modules that a call of the command has imported at its end."""
    code = (
        "import sys, atexit, json\n"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = {['surgery', *arguments]!r}\n"
        "from surgery.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return set(json.loads(done.stderr.strip().splitlines()[-1]))


def test_help_imports_only_what_parses_arguments() -> None:
    assert not imported_by("--help") & {"torch", "onnxruntime", "onnx", "numpy", "pydantic"}


def test_weight_commands_import_neither_torch_nor_onnxruntime(
    base_of: Callable[..., Path], heads: Path, tmp_path: Path
) -> None:
    model, edited = str(base_of("gpt2")), str(tmp_path / "edited")
    calls = [
        ["inspect", model],
        ["plan", str(heads), "--model", model],
        ["apply", str(heads), "--model", model, "--output", edited],
        ["verify", edited, "--base", model],
        ["schema", "recipe"],
    ]
    for call in calls:
        assert not imported_by(*call) & {"torch", "onnxruntime", "transformers"}, call


def test_every_command_has_help_with_an_example(run: Run) -> None:
    for name in cli.cli.commands:
        result = run(name, "--help")
        assert result.code == 0
        assert f"Example: surgery {name}" in " ".join(result.out.split()), name


def test_apply_then_verify_passes_and_a_flipped_byte_exits_1(
    run: Run, base_of: Callable[..., Path], heads: Path, tmp_path: Path
) -> None:
    model, edited = base_of("llama"), tmp_path / "edited"
    before = digests(model)
    assert run("apply", heads, "--model", model, "--output", edited).code == 0
    assert run("verify", edited, "--base", model).code == 0
    assert digests(model) == before
    weights = edited / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    result = run("verify", edited, "--json")
    assert result.code == 1
    assert json.loads(result.out)["findings"][0]["site"] == "model.safetensors"


def test_verify_without_a_receipt_is_bad_input(run: Run, base_of: Callable[..., Path]) -> None:
    assert_bad_input(run("verify", base_of("gpt2")))


def test_inspect_json_names_every_tensor_and_its_role(
    run: Run, base_of: Callable[..., Path]
) -> None:
    found = json.loads(run("inspect", base_of("qwen3"), "--json").out)
    roles = {row["name"]: row["role"] for row in found["tensors"]}
    assert roles["model.layers.1.self_attn.o_proj.weight"] == "o_proj.1.weight"
    assert found["tied"] is True


@pytest.mark.parametrize(
    "text",
    [
        "schema: 1\nedits: []\n",
        "schema: 2\nedits:\n  - {op: heads, heads: [L0H0]}\n",
        "schema: 1\nedits:\n  - {op: heds, heads: [L0H0]}\n",
        "schema: 1\nedits:\n  - {op: heads, heads: [L0H0], factr: 0}\n",
        "schema: 1\nedits:\n  - {op: heads, heads: [L0H0], factor: .nan}\n",
        "schema: 1\nedits:\n  - {op: heads, heads: [L7H0]}\n",
        "schema: 1\nedits:\n  - {op: heads, heads: [L0H9]}\n",
        "schema: 1\nedits:\n  - {op: heads, heads: []}\n",
        "schema: 1\nedits:\n  - {op: heads, heads: [L0H0, L0H0]}\n",
        "schema: 1\nedits:\n  - {op: heads, heads: [L0H0]}\n  - {op: heads, heads: [L0H0]}\n",
        "schema: 1\nedits:\n  - {op: neurons, file: ../outside.csv}\n",
        "schema: 1\nschema: 1\nedits: []\n",
        "schema: !!python/object:os.system 1\n",
        "a: &a [x]\nb: *a\n",
        "[" * 5000,
        "\ufeffschema: 1\n",
        "",
    ],
)
def test_a_bad_recipe_exits_2_with_one_line_and_leaves_nothing(
    run: Run, base_of: Callable[..., Path], tmp_path: Path, text: str
) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(text, encoding="utf-8")
    model = base_of("gpt2")
    before = digests(model)
    for command in (["apply"], ["validate"]):
        assert_bad_input(run(*command, recipe, "--model", model, "--output", output))
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert digests(model) == before


def test_an_output_that_is_occupied_or_inside_the_model_is_refused(
    run: Run, base_of: Callable[..., Path], heads: Path
) -> None:
    model = base_of("gpt2")
    before = digests(model)
    for output in (model, model / "edited", heads.parent):
        assert_bad_input(run("apply", heads, "--model", model, "--output", output))
    assert digests(model) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["apply"],
        ["apply", "--outptu", "x"],
        ["gate", "no-such-report.json"],
        ["report", "no-such-report.json"],
        ["inspect", "/dev/null"],
        ["export", "no-such-model", "--dtype", "int3"],
        ["diff", "--model", "no-such-model", "--report", "r.json"],
        ["schema", "recipes"],
    ],
)
def test_bad_usage_exits_2_with_one_line(run: Run, arguments: list[str]) -> None:
    assert_bad_input(run(*arguments))


def test_a_garbage_onnx_file_is_bad_input(
    run: Run, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    garbage, report = tmp_path / "model.onnx", tmp_path / "report.json"
    garbage.write_bytes(b"\x00garbage")
    model = base_of("gpt2")
    result = run("diff", "--model", model, "--onnx", garbage, "--report", report)
    assert_bad_input(result)
    assert not report.exists()


def test_options_are_read_from_the_environment(
    run: Run, base_of: Callable[..., Path], heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SURGERY_PLAN_MODEL", str(base_of("gpt2")))
    assert run("plan", heads).code == 0


def test_a_terminated_apply_exits_143_and_leaves_nothing(
    base_of: Callable[..., Path], heads: Path, tmp_path: Path
) -> None:
    code = (
        "import importlib, sys, time\n"
        "stream = importlib.import_module('surgery.checkpoint.stream')\n"
        "real = stream.read_into\n"
        "def slow(*arguments):\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(0.05)\n"
        "    real(*arguments)\n"
        "stream.read_into, stream.PART = slow, 64\n"
        f"sys.argv = ['surgery', 'apply', {str(heads)!r}, '--model', {str(base_of('gpt2'))!r},"
        f" '--output', {str(tmp_path / 'out')!r}]\n"
        "from surgery.cli import main\n"
        "main()\n"
    )
    for number, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        os.kill(child.pid, number)
        assert child.wait(30) == expected
        child.stdout.close()
        assert [path.name for path in tmp_path.iterdir()] == [heads.name]


def test_help_is_quick() -> None:
    """Not a benchmark: a tenfold margin that only an accidental heavy import would use up."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "surgery.cli", "--help"], check=True, capture_output=True)
    assert time.monotonic() - started < 10


def test_gate_and_report_read_what_was_written(run: Run, tmp_path: Path) -> None:
    from evidences import clean, edit_lost, report

    for evidence, code in ((clean(), 0), (edit_lost(), 1)):
        path = tmp_path / "report.json"
        path.write_text(report(evidence).dump(), encoding="utf-8")
        assert run("gate", path).code == code
        for format in cli.FORMATS:
            assert run("report", path, "--format", format).code == 0


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """A report file, in a folder of its own."""
    from evidences import clean, report

    path = tmp_path / "judged" / "report.json"
    path.parent.mkdir()
    path.write_text(report(clean()).dump(), encoding="utf-8")
    return path


def test_diff_never_writes_over_what_it_reads(
    run: Run, base_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.api.diff", lambda **options: pytest.fail("work was begun"))
    model, inputs = base_of("gpt2"), tmp_path / "inputs"
    inputs.mkdir()
    names = ("model.onnx", "model.onnx.data", "edited.onnx", "stimuli.jsonl", "policy.yaml")
    for name in names:
        (inputs / name).write_bytes(b"FAIL: not a report")
    (inputs / "model.onnx.data").write_bytes(b"weights")
    (inputs / "linked").symlink_to(inputs / "model.onnx")
    (inputs / "hard").hardlink_to(inputs / "policy.yaml")
    (inputs / "into").symlink_to(model / "report.json")
    edited = tmp_path / "edited"
    edited.mkdir()
    options: list[object] = ["--model", model, "--edited", edited]
    for option, name in zip(
        ("--onnx", "--edited-onnx", "--stimuli", "--policy"),
        ("model.onnx", "edited.onnx", "stimuli.jsonl", "policy.yaml"),
        strict=True,
    ):
        options += [option, inputs / name]
    targets = [inputs / name for name in (*names, "linked", "hard", "into")]
    targets += [model / "new.json", model / "config.json", edited / "new.json", inputs]
    before = digests(tmp_path), digests(model)
    for target in targets:
        result = run("diff", *options, "--report", target)
        assert_bad_input(result)
        assert str(target) in result.err
    assert (digests(tmp_path), digests(model)) == before


def test_diff_may_write_over_an_older_report(
    run: Run, judged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evidences import edit_lost, report

    monkeypatch.setattr("surgery.api.diff", lambda **options: report(edit_lost()))
    assert run("diff", "--model", "model", "--report", judged).code == 1
    assert json.loads(judged.read_text())["verdict"] == "fail"


def test_report_never_writes_over_its_source_or_into_a_checkpoint(
    run: Run, judged: Path, base_of: Callable[..., Path], tmp_path: Path
) -> None:
    model, edited = base_of("gpt2"), tmp_path / "edited"
    (edited / "sub").mkdir(parents=True)
    (edited / "surgery-receipt.json").write_text("{}")
    other = tmp_path / "stimuli.jsonl"
    other.write_text("{}")
    (tmp_path / "linked").symlink_to(judged)
    (tmp_path / "hard").hardlink_to(judged)
    before = digests(tmp_path), digests(model)
    targets = [judged, tmp_path / "linked", tmp_path / "hard", other, Path(os.devnull)]
    targets += [model / "x.html", model / "config.json", edited / "x.html", edited / "sub/x.html"]
    for target in targets:
        assert_bad_input(run("report", judged, "--output", target))
    assert (digests(tmp_path), digests(model)) == before


@pytest.mark.parametrize("format", cli.FORMATS)
def test_a_rendered_report_may_be_written_again(
    run: Run, judged: Path, tmp_path: Path, format: str
) -> None:
    output = tmp_path / "rendered"
    for _ in range(2):
        assert run("report", judged, "--format", format, "--output", output).code == 0
    assert output.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judged", "rendered"]


def test_a_forged_verdict_is_not_shown(run: Run, judged: Path) -> None:
    from evidences import edit_lost, report

    forged = json.loads(report(edit_lost()).dump()) | {"verdict": "pass", "findings": []}
    judged.write_text(json.dumps(forged))
    for command in ("report", "gate"):
        result = run(command, judged)
        assert_bad_input(result)
        assert "its verdict is not what its evidence says" in result.err and not result.out


@pytest.mark.parametrize(
    "option",
    [("--seed", "-1"), ("--timeout", "nan"), ("--timeout", "inf"), ("--budget", "nan")],
)
def test_numbers_that_mean_nothing_are_bad_usage(run: Run, option: tuple[str, str]) -> None:
    result = run("diff", "--model", "no-such-model", "--report", "r.json", *option)
    assert_bad_input(result)
    assert option[0] in result.err


def test_flags_are_read_from_the_environment(
    run: Run, base_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = base_of("gpt2")
    monkeypatch.setenv("SURGERY_INSPECT_JSON", "1")
    monkeypatch.setenv("SURGERY_DIFF_WEIGHTS_JSON", "1")
    assert json.loads(run("inspect", model).out)["family"] == "gpt2"
    assert json.loads(run("diff-weights", model, model).out)["changed"] == []
    monkeypatch.setenv("SURGERY_DEBUG", "1")
    assert "Traceback" in run("inspect", "no-such-model").err
    monkeypatch.setenv("SURGERY_DEBUG", "0")
    assert_bad_input(run("inspect", "no-such-model"))


def test_no_command_prints_the_help(run: Run) -> None:
    result = run()
    assert result.code == 2 and not result.err
    assert result.out == run("--help").out
    assert result.out.count("\n") > 10


def test_the_module_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "surgery", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith("surgery, ")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
@pytest.mark.parametrize("module", ["click", "surgery.cli"])
def test_a_signal_during_the_imports_leaves_no_traceback(
    module: str, number: int, code: int
) -> None:
    script = (
        "import os, sys\n"
        "class Signal:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name == {module!r}:\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Signal())\n"
        "sys.argv = ['surgery', '--help']\n"
        "from surgery.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from surgery import __main__, cli\n"
        "cli.cli.callback = lambda debug: os.kill(os.getpid(), signal.SIGHUP)\n"
        "sys.argv = ['surgery', 'schema', 'policy']\n"
        "__main__.main()\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_the_text_is_as_wide_as_asked(
    run: Run, judged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = {}
    for columns in ("", "20", "80", "100", "400"):
        monkeypatch.setenv("COLUMNS", columns)
        lines = run("report", judged).out.splitlines()
        widths[columns] = max(map(len, lines))
    assert widths["20"] == widths["80"] <= 80
    assert 80 < widths["100"] <= 100 and widths[""] <= 120 and widths["400"] <= 160


def test_the_help_of_gate_names_its_default_policy(run: Run) -> None:
    assert "the report's own" in " ".join(run("gate", "--help").out.split())
