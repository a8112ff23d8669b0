"""Write what is made from the code: docs/recipe.md and docs/recipes.md, what GPU recipes need, README.md's table.

python scripts/document.py           write them
python scripts/document.py --check   exit 1 where one of them is not current
"""

import sys
from pathlib import Path

from alignctl.cli.plan import span
from alignctl.plan import config, data, estimate, gpus
from alignctl.plan.duration import seconds
from alignctl.plan.estimate import Plan
from alignctl.plan.gpus import GIB, Gpu
from alignctl.recipe import catalog, document, load

ROOT = Path(__file__).parents[1]
START, END = "<!-- recipes: made by `make docs` -->", "<!-- end -->"
NEEDS = "# Needs: a CUDA GPU"
# A GPU of each size that docs/recipes.md has a column for.
COLUMNS = [gpu for gpu in gpus.GPUS if gpu.name in ("RTX 4080", "RTX 4090", "A100")]


def plans() -> dict[str, Plan]:
    """The plan of every built-in recipe, from the recipe alone."""
    recipes = {name: load.load(catalog.entry(name).path).recipe for name in catalog.names()}
    return {
        name: estimate.of(recipe, config.shape_of(recipe.model), data.of_recipe(recipe))
        for name, recipe in recipes.items()
    }


def needs(name: str, plan: Plan) -> str:
    """What a recipe needs, as its header says."""
    if not any(line.startswith(NEEDS[2:]) for line in catalog.entry(name).header):
        return catalog.entry(name).needs
    bf16 = " with bfloat16" if plan.recipe.model.dtype == "bfloat16" else ""
    return f"a CUDA GPU{bf16}, {plan.memory.needed / GIB:.1f} GiB as planned (not measured yet)"


def recipe_file(name: str, plan: Plan) -> str:
    """A built-in recipe with what it needs in its header."""
    lines = catalog.entry(name).path.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(f"# Needs: {needs(name, plan)}\n" if line.startswith(NEEDS) else line for line in lines)


def memory_page(found: dict[str, Plan]) -> str:
    """docs/recipes.md."""
    head = ["recipe", "tensors at the peak, GiB", "needed, GiB", *(f"{gpu.memory} GiB ({gpu.name})" for gpu in COLUMNS)]
    rows = [f"| {' | '.join([*head, 'measured'])} |", "|---" * (len(head) + 1) + "|"]
    for name, plan in found.items():
        cells = [f"`{name}`", *(f"{size / GIB:.2f}" for size in (plan.memory.allocated, plan.memory.needed))]
        rows.append(f"| {' | '.join([*cells, *(_fits(plan, gpu) for gpu in COLUMNS), '—'])} |")
    return PAGE.replace("TABLE", "\n".join(rows)).replace("SHARE", f"{gpus.ASSUMED:.0%}")


def _fits(plan: Plan, gpu: Gpu) -> str:
    """How long on a GPU that is large enough, or what makes it fit."""
    if plan.memory.needed > gpu.memory * GIB:
        changes = plan.fixes(gpu.memory * GIB)
        return f"no; {changes[-1].needed / GIB:.1f} GiB with `{' '.join(map(str, changes))}`"
    one = seconds(plan.work, gpu)
    step = f"{span(one * plan.recipe.training.gradient_accumulation_steps)} a step"
    return step if plan.passes is None else f"{step}, {span(one * plan.passes)} in all"


PAGE = """# What the built-in recipes take

Planned, by `alignctl plan` ([memory.md](memory.md)); nothing in this table was measured on a GPU yet. The rows of a
recipe that reads the hub are not at hand when this page is made: they are taken to fill `data.max_length` and to share
no prompt, so that memory and time are the most that there can be. Times are without evaluation, at an assumed SHARE of
the GPU's rate. *Needed* is the tensors, 0.5 GiB for the CUDA context and 5 % for what the allocator loses.

TABLE

This page is made by `make docs`.
"""


def recipe_table(found: dict[str, Plan]) -> str:
    rows = ["| recipe | method | model | what it does | needs |", "|---|---|---|---|---|"]
    for name in catalog.names():
        entry = catalog.entry(name)
        recipe = load.load(entry.path).recipe
        cells = (
            f"[`{name}`](recipes/{name}.yaml)",
            recipe.method,
            recipe.model.name_or_path,
            entry.summary,
            needs(name, found[name]),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def pages() -> dict[Path, str]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(START)
    after = rest.partition(END)[2]
    found = plans()
    return {
        **{catalog.entry(name).path: recipe_file(name, plan) for name, plan in found.items()},
        ROOT / "docs" / "recipes.md": memory_page(found),
        ROOT / "docs" / "recipe.md": document.markdown(),
        ROOT / "README.md": f"{before}{START}\n{recipe_table(found)}\n{END}{after}",
    }


def main() -> None:
    made = pages()
    stale = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if "--check" not in sys.argv:
            path.write_text(made[path], encoding="utf-8")
        print("stale" if "--check" in sys.argv else "written", path.relative_to(ROOT))
    sys.exit(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    main()
