"""The commands. Each is a few lines: what it does, it does elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from alignctl import __version__

app = typer.Typer(
    name="alignctl",
    help="Align language models on one GPU, from one recipe.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
recipes = typer.Typer(help="The built-in recipes.", invoke_without_command=True)
app.add_typer(recipes, name="recipes")

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a built-in one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="e.g. training.learning_rate=1e-5 dpo.beta=0.05")
]
Output = Annotated[Path | None, typer.Option("--output", help="The run's folder; runs/NAME when not given.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run's folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that the folder holds.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="The same code on a tiny stand-in and a few rows; no network.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Align language models on one GPU, from one recipe."""


def _add_training_command(method: str, what: str) -> None:
    @app.command(method, help=what)
    def command(
        recipe: Recipe,
        overrides: Overrides = None,
        output: Output = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        smoke: Smoke = False,
        debug: Debug = False,  # read by `main`, which must know of it before the commands are parsed
    ) -> None:
        from alignctl.cli import training

        training.command(method, recipe, overrides, output, resume=resume, overwrite=overwrite, smoke=smoke)


_add_training_command("sft", "Supervised fine-tuning.")
_add_training_command("dpo", "Direct Preference Optimization.")
_add_training_command("orpo", "Odds Ratio Preference Optimization.")


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="What this recipe asks, too.")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at this machine: what it has for training, what each gap costs, and the way out."""
    from alignctl.cli import doctor

    doctor.command(recipe, overrides, as_json=as_json)


@app.command()
def init(
    method: Annotated[str | None, typer.Option("--method", help="sft, dpo or orpo.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="A hub name, or a model's folder.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Rows: a file, a folder or a hub name.")] = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="FILE", help="The recipe; never replaced.")] = None,
    split: Annotated[str, typer.Option("--split", help="The split of a hub data set.")] = "train",
    eval_data: Annotated[str | None, typer.Option("--eval-data", help="Held-out rows; else a share of them.")] = None,
    eval_split: Annotated[str, typer.Option("--eval-split", help="The split of --eval-data.")] = "test",
    adapter: Annotated[str, typer.Option("--adapter", help="auto, qlora, lora or full.")] = "auto",
    template: Annotated[str | None, typer.Option("--chat-template", help="Its name, or a .jinja file.")] = None,
    gpu_memory: Annotated[str | None, typer.Option("--gpu-memory", metavar="24GiB", help="For another GPU.")] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="CONFIG", help="A recipe of alignment-handbook, TRL, axolotl, LLaMA-Factory."),
    ] = None,
    dialect: Annotated[str | None, typer.Option("--dialect", help="The tool that --from is of.")] = None,
    debug: Debug = False,
) -> None:
    """Write a commented recipe from a few answers, or from a recipe of another tool, and check it."""
    from alignctl.cli import init

    beside = {"--model": model, "--data": data, "--eval-data": eval_data, "--chat-template": template}
    if source is not None and any(beside.values()):
        raise init.contradiction(beside)
    if source is not None:
        init.from_other(source, dialect, method, output, gpu_memory)
    else:
        init.command(
            init.Asked(method, model, data, output, split, eval_data, eval_split, adapter, template, gpu_memory)
        )


@app.command()
def check(recipe: Recipe, overrides: Overrides = None, as_json: Json = False, debug: Debug = False) -> None:
    """Check recipe, data and tokenizer: where every row goes, and what is odd about the rows. No weights are loaded."""
    from alignctl.cli import check

    check.command(recipe, overrides, as_json=as_json)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", metavar="SIZE", help="e.g. 24GiB; the GPU's here when not given.")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option("--rows", metavar="FILE", help="Rows (.jsonl) to take the lengths from.")
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Write a recipe beside that fits.")] = False,
    as_json: Json = False,
    measure: Annotated[bool, typer.Option("--measure", help="Load the model and time three steps.")] = False,
    debug: Debug = False,
) -> None:
    """Plan memory, line by line, and time, before anything is downloaded; and what to change when it does not fit."""
    from alignctl.cli import plan

    plan.command(recipe, overrides, gpu_memory=gpu_memory, rows=rows, fix=fix, as_json=as_json, measure=measure)


@app.command()
def inspect(
    recipe: Recipe,
    overrides: Overrides = None,
    row: Annotated[
        str | None, typer.Option("--row", metavar="N", help="The N-th row kept, or a place such as pairs.jsonl:17.")
    ] = None,
    longest: Annotated[bool, typer.Option("--longest", help="The longest row.")] = False,
    at_random: Annotated[bool, typer.Option("--random", help="Any row.")] = False,
    part: Annotated[str, typer.Option("--part", help="train or eval.")] = "train",
    side: Annotated[str | None, typer.Option("--side", help="chosen or rejected alone.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Token ids too.")] = False,
    as_json: Json = False,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="Write all rows as messages (.jsonl) instead.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show a row as the model will see it: rendered text, what is trained, token ids."""
    from alignctl.cli import inspect

    inspect.command(
        recipe,
        overrides,
        row=row,
        longest=longest,
        at_random=at_random,
        part=part,
        side=side,
        ids=ids,
        as_json=as_json,
        export=export,
    )


@app.command()
def verify(run: Run, debug: Debug = False) -> None:
    """Check that what a run saved is what it trained: every number, template, stop tokens, and loaded anew."""
    from alignctl.cli import verify

    verify.command(run)


@app.command("eval")
def evaluate(
    run: Run,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Rows to evaluate on, instead of those held out.")
    ] = None,
    against: Annotated[
        str,
        typer.Option("--against", metavar="start|base|RUN", help="The reference: what training started from, or …"),
    ] = "start",
    samples: Annotated[int | None, typer.Option("--samples", min=0, help="How many prompts are answered.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the answers that are drawn.")] = 0,
    reward_model: Annotated[
        str | None, typer.Option("--reward-model", metavar="MODEL", help="Judge: a model that gives one number.")
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option("--judge-url", metavar="URL", help="Judge: an endpoint of OpenAI's protocol.")
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", metavar="NAME", help="The endpoint's model.")
    ] = None,
    judge_rule: Annotated[
        str | None,
        typer.Option("--judge-rule", metavar="FILE.py:FUNCTION", help="Judge: a function (prompt, answer) -> number."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", metavar="TASK", help="A task of lm-eval; may be given often.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Did it get better? Trained model and reference on held-out rows, with intervals, answers and a verdict."""
    from alignctl.cli import evaluation

    evaluation.command(
        run,
        data=data,
        against=against,
        samples=samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
        judges=evaluation.Judges(reward_model, judge_url, judge_model, judge_rule),
        tasks=tasks or [],
        json=as_json,
    )


@app.command()
def chat(
    run: Run,
    base: Annotated[bool, typer.Option("--base", help="Talk to what training started from.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Both answer: the base, then the tuned model.")] = False,
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="The system message.")] = "",
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="Of sampling; 0 is greedy.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 512,
    seed: Annotated[int | None, typer.Option("--seed", help="The same answers again.")] = None,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Where /save adds pairs; RUN/preferences.jsonl.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Talk to a run's model, beside its base if you like, and keep pairs of answers for another `alignctl dpo`."""
    from alignctl.cli import chat

    chat.command(
        run,
        base=base,
        compare=compare,
        system=system,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        save=save,
    )


@app.command()
def merge(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The merged model's folder.")],
    onto: Annotated[
        str | None,
        typer.Option("--onto", help="original or dequantized base weights; default: as they were in training."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="bfloat16, float16 or float32; default: the run's.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", metavar="NATS", help="Allow the merged model to be so far off.")
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option("--gguf", metavar="FILE", help="A GGUF file and a Modelfile too, for Ollama.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Merge a run's adapter into its base: a model folder for plain transformers, compared with the adapter."""
    from alignctl.cli import merge

    merge.command(run, out, onto=onto, dtype=dtype, max_kl=max_kl, gguf=gguf)


@app.command()
def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder, or a merged model's.")],
    extra: Annotated[
        list[str] | None, typer.Argument(metavar="-- ARGUMENTS", help="More arguments for the server.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    show: Annotated[bool, typer.Option("--print", help="Print the server's command, and run nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Serve what a run saved, by vLLM or else `transformers serve`, with its template and stop tokens."""
    from alignctl.cli import serve

    serve.command(run, port, extra or [], show=show)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="A model repository of the hub, such as you/your-model.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else may see it.")] = False,
    merged: Annotated[
        Path | None, typer.Option("--merged", metavar="DIR", help="Upload what alignctl merge made of the run.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Verify, say what would be uploaded, and stop.")] = False,
    debug: Debug = False,
) -> None:
    """Verify a run's model and upload it to the hub."""
    from alignctl.cli import push

    push.command(run, repo, merged, private=private, dry_run=dry_run)


@recipes.callback()
def list_recipes(context: typer.Context) -> None:
    """List the built-in recipes."""
    if context.invoked_subcommand is None:
        from alignctl.cli import catalogue

        catalogue.show_all()


@recipes.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="A built-in recipe.")]) -> None:
    """Print a built-in recipe."""
    from alignctl.recipe import catalog

    typer.echo(catalog.entry(name).path.read_text(encoding="utf-8"), nl=False)


@recipes.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="A built-in recipe.")],
    destination: Annotated[Path, typer.Argument(help="A file or folder.")] = Path(),
) -> None:
    """Copy a built-in recipe, to change it."""
    from alignctl.recipe import catalog

    typer.echo(catalog.copy(name, destination))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from alignctl.recipe.document import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def report(run: Run, debug: Debug = False) -> None:
    """Write RUN/report.html: verdict, gates, curves, data, answers and numbers on one page."""
    from alignctl.cli import report

    report.command(run)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN …", help="Folders of runs; the first is the measure.")],
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page, too.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Set runs beside each other: recipes, the same held-out rows with paired differences, answers, curves, cost."""
    from alignctl.cli import compare

    compare.command(runs, html, as_json=as_json)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to look.")] = Path("runs"),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the runs below a folder, the newest first."""
    from alignctl.cli import runs

    runs.command(folder, as_json=as_json)
