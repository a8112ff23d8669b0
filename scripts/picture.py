"""Run a command in a terminal of its own and draw what it leaves on the screen as SVG.

python scripts/picture.py docs/run.svg alignctl dpo demo-dpo --overwrite
"""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, LINES = 120, 60


def screen_of(command: list[str]) -> pyte.Screen:
    """The terminal's screen, with what scrolled off, after `command` has ended."""
    screen = pyte.Screen(COLUMNS, 400)
    stream = pyte.ByteStream(screen)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(
            TERM="xterm-256color", COLUMNS=str(COLUMNS), PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        )
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:
            break
        if not data:
            break
        stream.feed(data)
    os.waitpid(pid, 0)
    return screen


def style_of(cell: pyte.screens.Char) -> Style:
    colour = None if cell.fg == "default" else cell.fg.replace("brown", "yellow")
    hexadecimal = colour is not None and re.fullmatch("[0-9a-f]{6}", colour)
    return Style(color=f"#{colour}" if hexadecimal else colour, bold=cell.bold)


def text_of(screen: pyte.Screen) -> list[Text]:
    """The lines of a screen, one piece of text for each run of cells that look alike."""
    lines = []
    for row in range(screen.cursor.y + 1):
        cells = [screen.buffer[row][column] for column in range(COLUMNS)]
        text = Text()
        for style, run in groupby(cells, style_of):
            text.append("".join(cell.data for cell in run), style)
        text.rstrip()
        lines.append(text)
    return lines


def main() -> None:
    target, *command = sys.argv[1:]
    lines = text_of(screen_of(command))
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(Text("$ " + " ".join(word for word in command if word != "--overwrite"), style="bold"))
        for line in lines:
            console.print(line, soft_wrap=True)
        Path(target).write_text(console.export_svg(title="alignctl"), encoding="utf-8")


if __name__ == "__main__":
    main()
