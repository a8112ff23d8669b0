"""Text from elsewhere, made safe to print."""

from __future__ import annotations

import json
import re

from alignctl import secrets

# Controls but for tab and line feed, marks that turn the direction of writing around, and halves of characters.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """`text` without secrets, and without characters that would move a terminal's cursor or change its colours."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", secrets.hide(text))


def as_json(value: object) -> str:
    """`value` as JSON to read, without secrets, and with what would move a terminal written as an escape."""
    text = json.dumps(secrets.hidden(value), indent=2, ensure_ascii=False, default=str)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
