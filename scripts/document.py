"""Write the pages and tables that are made from the code: docs/recipe.md, and the recipe table in README.md.

python scripts/document.py           write them
python scripts/document.py --check   exit 1 where one of them is not current
"""

import sys
from pathlib import Path

from alignctl.recipe import catalog, document, load

ROOT = Path(__file__).parents[1]
START, END = "<!-- recipes: made by `make docs` -->", "<!-- end -->"


def recipe_table() -> str:
    rows = ["| recipe | method | model | what it does | needs |", "|---|---|---|---|---|"]
    for name in catalog.names():
        entry = catalog.entry(name)
        recipe = load.load(entry.path).recipe
        cells = (
            f"[`{name}`](recipes/{name}.yaml)",
            recipe.method,
            recipe.model.name_or_path,
            entry.summary,
            entry.needs,
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def pages() -> dict[Path, str]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition(START)
    after = rest.partition(END)[2]
    return {
        ROOT / "docs" / "recipe.md": document.markdown(),
        ROOT / "README.md": f"{before}{START}\n{recipe_table()}\n{END}{after}",
    }


def main() -> None:
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if "--check" not in sys.argv:
            path.write_text(pages()[path], encoding="utf-8")
        print("stale" if "--check" in sys.argv else "written", path.relative_to(ROOT))
    sys.exit(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    main()
