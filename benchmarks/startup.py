"""CPU seconds of the commands that must answer at once, beside `trl dpo --help`.

python benchmarks/startup.py
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

BAD = "model: {name_or_path: x, dtpe: auto}\ndata: {train: []}\ntraining: {learning_rate: fast}\ndpo: {}\n"
RECIPES = ("phi2-ultrafeedback", "mistral7b-zephyr-dpo")
PLANS = [(name, "--gpu-memory", f"{size}GiB") for name in RECIPES for size in (8, 12, 16, 24)]
REPEATS = 5


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    here = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        bad = Path(folder) / "bad.yaml"
        bad.write_text(BAD, encoding="utf-8")
        commands = [
            [str(here / "alignctl"), "--help"],
            [str(here / "alignctl"), "dpo", "--help"],
            [str(here / "alignctl"), "dpo", str(bad)],
            *([str(here / "alignctl"), "plan", *given] for given in PLANS),
            [str(here / "trl"), "dpo", "--help"],
        ]
        print("| command | CPU seconds, median of", REPEATS, "|\n|---|---|")
        for command in commands:
            times = sorted(cpu_seconds(command) for _ in range(REPEATS))
            words = " ".join([Path(command[0]).name, *command[1:]]).replace(str(bad), "bad.yaml")
            print(f"| `{words}` | {times[REPEATS // 2]:.2f} |")


if __name__ == "__main__":
    main()
