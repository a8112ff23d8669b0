"""The real command line: what it prints, how it exits, what it leaves behind.

In a subprocess where the process itself matters, and else in this one, which has the libraries already.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from alignctl.recipe import catalog, load
from alignctl.train import standin

Run = Callable[..., subprocess.CompletedProcess[str]]


def cpu_seconds(*arguments: str, cwd: Path) -> float:
    """CPU seconds of one command: the best of three, since the machine is shared."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "alignctl", *arguments], cwd=cwd, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


BAD = """model:
  name_or_path: x
  chat_templte: chatml
data:
  train: [{path: a.jsonl}]
training:
  learning_rate: fast
lora_r: 8
dpo: {}
"""


@pytest.mark.parametrize("arguments", [["--help"], ["dpo", "--help"]])
def test_help_is_quick(tmp_path: Path, arguments: list[str]) -> None:
    assert cpu_seconds(*arguments, cwd=tmp_path) < 0.35


def test_a_bad_recipe_is_answered_quickly(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(BAD)
    assert cpu_seconds("dpo", "bad.yaml", cwd=tmp_path) < 0.5


def test_three_mistakes_at_once(tmp_path: Path, alignctl: Run) -> None:
    (tmp_path / "bad.yaml").write_text(BAD)
    done = alignctl("dpo", "bad.yaml")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["bad.yaml:3", "bad.yaml:7", "bad.yaml:8"]
    assert "did you mean model.chat_template?" in lines[0]
    assert "training.learning_rate" in lines[1]
    assert "lora.r" in lines[2]
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["dpo", "--help"], ["recipes"], ["schema"], ["dpo", "bad.yaml"], ["runs", "."]]
)
def test_light_commands_never_import_torch(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "bad.yaml").write_text(BAD)
    code = (
        "import sys; sys.argv = ['alignctl', *sys.argv[1:]]\n"
        "from alignctl.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
        "print('HEAVY', sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "HEAVY []"


def test_version(alignctl: Run) -> None:
    assert alignctl("--version").stdout.strip() == "0.1.0"


def test_recipes_are_listed_shown_and_copied(tmp_path: Path, alignctl: Run) -> None:
    listed = alignctl("recipes").stdout
    assert [line.split()[0] for line in listed.splitlines()[1:]] == catalog.names()
    shown = alignctl("recipes", "show", "demo-dpo").stdout
    assert shown == (catalog.folder() / "demo-dpo.yaml").read_text()
    assert alignctl("recipes", "copy", "demo-dpo", "mine.yaml").returncode == 0
    assert (tmp_path / "mine.yaml").read_text() == shown
    assert alignctl("recipes", "copy", "demo-dpo", "mine.yaml").returncode == 2


def test_schema_is_json(alignctl: Run) -> None:
    assert json.loads(alignctl("schema").stdout)["title"] == "alignctl recipe"


@pytest.fixture
def there(tmp_path: Path, here: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line in this process, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    return here


def method_of(name: str) -> str:
    return load.load(catalog.find(name)).recipe.method


def test_a_smoke_run_has_nothing_to_say_on_stderr(alignctl: Run) -> None:
    done = alignctl("dpo", "phi2-ultrafeedback", "--smoke")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", catalog.names())
def test_every_recipe_smokes(tmp_path: Path, there: Run, name: str) -> None:
    done = there(method_of(name), name, "--smoke", "gates.reload=off")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / f"{name}-smoke"
    record = json.loads((run / "run.json").read_text())
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert record["status"] == "finished"
    assert ("quantization" in recipe) == (load.load(catalog.find(name)).recipe.quantization is not None)
    assert "4-bit" in done.stdout if "quantization" in recipe else True
    made = {path.name for path in run.iterdir()}
    assert made >= {
        "recipe.yaml",
        "run.json",
        "ledger.json",
        "metrics.jsonl",
        "checkpoints",
        "logs",
        "model",
        "report.html",
    }
    assert made >= {"samples.jsonl", "summary.json"} and "model.writing" not in made and "stand-in" not in made
    model = {path.name for path in (run / "model").iterdir()}
    assert model >= {"README.md", "tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert model & {"adapter_model.safetensors", "model.safetensors"}
    steps = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert steps[0].keys() >= {"epoch", "loss", "lr", "grad_norm", "tokens_per_second", "pairs_per_second"}
    assert steps[0].keys() >= {"peak_memory_gib", "eta_seconds"}
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-1", "step-2"]


def in_a_terminal(*arguments: str, cwd: Path) -> str:
    """What a command writes to a terminal of its own."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.environ.update(TERM="xterm", COLUMNS="120", OMP_NUM_THREADS="1")
        os.execv(sys.executable, [sys.executable, "-m", "alignctl", *arguments])
    out = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error on Linux
        while data := os.read(terminal, 65536):
            out += data
    assert os.waitpid(pid, 0)[1] == 0
    return out.decode()


def test_a_terminal_shows_nothing_of_the_libraries(tmp_path: Path) -> None:
    out = in_a_terminal("dpo", "phi2-ultrafeedback", "--smoke", cwd=tmp_path)
    log = (tmp_path / "runs/phi2-ultrafeedback-smoke/logs/libraries.log").read_text()
    assert "Warning" in log and "Warning" not in out
    assert "2/2" in out and "finished in" in out


RECIPE = """model: {{name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct}}
lora: {{r: 4}}
data:
  train: [{{path: {data}}}]
  eval_fraction: 0.25
training: {{learning_rate: 1e-3}}
dpo: {{}}
"""


def write_recipe(folder: Path, data: str = "pairs.jsonl") -> None:
    (folder / "r.yaml").write_text(RECIPE.format(data=data))


def error(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of the error."""
    (line,) = done.stderr.splitlines()
    assert line.startswith("alignctl: ")
    return line


def last(done: subprocess.CompletedProcess[str]) -> str:
    """The line of the error in this process, where the libraries' loggers may have written before it."""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("alignctl: ")
    return line


def status(folder: Path, run: str = "runs/r-smoke") -> str:
    return str(json.loads((folder / run / "run.json").read_text())["status"])


def test_missing_recipe(alignctl: Run) -> None:
    done = alignctl("dpo", "demo-dop")
    assert done.returncode == 2 and "did you mean demo-dpo?" in error(done)


def test_wrong_command_for_a_recipe(there: Run) -> None:
    done = there("orpo", "demo-dpo")
    assert done.returncode == 2 and "run `alignctl dpo`" in error(done)


SAME = "".join(f'{{"prompt": "{i}", "chosen": "b", "rejected": "b"}}\n' for i in range(4))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("missing.jsonl", None, "no such file"),
        ("empty.jsonl", "", "has no rows"),
        ("broken.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n', "broken.jsonl:2"),
        (
            "columns.jsonl",
            '{"question": "a", "answer": "b"}\n',
            "columns are `question` (a string), `answer` (a string)",
        ),
        (
            "null.jsonl",
            '{"prompt": "a", "chosen": "b", "rejected": null}\n',
            "null.jsonl:1: `rejected` is null, expected a value",
        ),
        ("same.jsonl", SAME, "chosen equals rejected: "),
    ],
)
def test_bad_data(tmp_path: Path, there: Run, name: str, text: str | None, said: str) -> None:
    write_recipe(tmp_path, name)
    if text is not None:
        (tmp_path / name).write_text(text)
    done = there("dpo", "r.yaml", "--smoke")
    assert done.returncode == 3 and said in last(done)
    assert status(tmp_path) == "failed"
    assert said in json.loads((tmp_path / "runs/r-smoke/run.json").read_text())["why"]


def test_model_hub_that_cannot_be_reached(tmp_path: Path, alignctl: Run, pairs: Path) -> None:
    write_recipe(tmp_path)
    done = alignctl("dpo", "r.yaml")
    assert done.returncode == 4 and "cannot be reached" in error(done)
    assert status(tmp_path, "runs/r") == "failed"


def test_data_hub_that_cannot_be_reached(tmp_path: Path, alignctl: Run) -> None:
    write_recipe(tmp_path, "nobody/nothing")
    standin.stand_in(load.load(tmp_path / "r.yaml").recipe, tmp_path / "tiny")
    done = alignctl("dpo", "r.yaml", "model.name_or_path=tiny/model")
    assert done.returncode == 4 and "nobody/nothing" in error(done)


def test_output_that_cannot_be_written(tmp_path: Path, there: Run, pairs: Path) -> None:
    write_recipe(tmp_path)
    (tmp_path / "file").write_text("x")
    done = there("dpo", "r.yaml", "--smoke", "--output", "file/run")
    assert done.returncode == 2 and "cannot be written" in error(done)


def test_4_bit_without_bitsandbytes(tmp_path: Path, alignctl: Run, pairs: Path) -> None:
    """A finder in sitecustomize stands for an environment without the package."""
    write_recipe(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.startswith('bitsandbytes') else find(name, *a)\n"
    )
    done = alignctl("dpo", "r.yaml", "quantization={}", "--smoke", PYTHONPATH=str(tmp_path))
    assert done.returncode == 4 and "bitsandbytes is not installed" in error(done)


def test_finished_run_is_never_overwritten(tmp_path: Path, there: Run, pairs: Path) -> None:
    write_recipe(tmp_path)
    smoke = ("dpo", "r.yaml", "gates.reload=off", "--smoke", "--output", "out")
    assert there(*smoke).returncode == 0
    before = (tmp_path / "out/run.json").read_text()
    done = there(*smoke)
    assert done.returncode == 2 and "--overwrite" in last(done)
    assert (tmp_path / "out/run.json").read_text() == before
    assert there(*smoke, "--overwrite").returncode == 0
    done = there(*smoke, "--resume")
    assert done.returncode == 2 and "is finished already" in last(done)


def test_training_that_diverges(tmp_path: Path, there: Run, pairs: Path) -> None:
    write_recipe(tmp_path)
    done = there("dpo", "r.yaml", "--smoke", "training.learning_rate=1e30")
    assert done.returncode == 5 and "lower training.learning_rate" in last(done)
    assert status(tmp_path) == "failed"
    assert not (tmp_path / "runs/r-smoke/model").exists()


def test_secrets_stay_out_of_the_run_folder(tmp_path: Path, alignctl: Run, pairs: Path) -> None:
    write_recipe(tmp_path)
    done = alignctl("dpo", "r.yaml", "trl={run_name: '${oc.env:SECRET}'}", "--smoke", SECRET="hunter2-hunter2")
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "runs").rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl", ".yaml", ".md", ".log"):
            assert "hunter2" not in path.read_text(errors="replace"), path
    assert "${oc.env:SECRET}" in (tmp_path / "runs/r-smoke/recipe.yaml").read_text()


def test_full_disk_while_a_checkpoint_is_written(tmp_path: Path, pairs: Path) -> None:
    """A limit on file size makes the optimizer's file fail as a full disk would."""
    write_recipe(tmp_path)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

    command = [sys.executable, "-m", "alignctl", "dpo", "r.yaml", "--smoke", "lora.r=64"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "the disk is full; no checkpoint had been written" in error(done)
    assert status(tmp_path) == "failed"
    assert list((tmp_path / "runs/r-smoke/checkpoints").iterdir()) == []
    assert not (tmp_path / "runs/r-smoke/model").exists()


def test_help_says_what_the_defaults_are(alignctl: Run) -> None:
    words = " ".join(alignctl("dpo", "--help", COLUMNS="200").stdout.split())
    assert "runs/NAME when not given" in words
    assert "RECIPE" in words and "KEY=VALUE" in words


def test_a_recipe_that_holds_nothing_out(tmp_path: Path, there: Run, pairs: Path) -> None:
    write_recipe(tmp_path)
    done = there("dpo", "r.yaml", "--smoke", "data.eval_fraction=null", "gates.reload=off")
    assert done.returncode == 0, done.stderr
    assert "not measured: the recipe holds no rows out" in done.stdout
    assert "samples.jsonl" not in done.stdout
    summary = json.loads((tmp_path / "runs/r-smoke/summary.json").read_text())
    assert summary == {"method": "dpo", "verdict": "not measured: the recipe holds no rows out"}
