"""Text from elsewhere as it can be shown: control and direction characters by symbol or number.

Models, servers and files may write what a terminal obeys or a page turns round. Every start waits
for this file, so it loads next to nothing.
"""

from __future__ import annotations

import unicodedata


def visible(text: str, limit: int = 0, keep: str = "") -> str:
    """Show what cannot be seen: control and direction characters by symbol or number.

    Args:
        text: anything, such as what a model wrote.
        limit: longest piece shown, in characters; what was cut is counted. 0 for all of it.
        keep: characters left as they are.
    """
    cut = text[:limit] if limit else text
    shown = "".join(c if c in keep else _shown(c) for c in cut)
    rest = len(text) - len(cut)
    return f"{shown} \u2026 (+{rest} characters)" if rest else shown


def _shown(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return "\u23ce"
    if code < 0x20:
        return chr(0x2400 + code)
    joiner = code in (0x200C, 0x200D)  # part of ordinary words and emoji
    unseen = unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")
    never_a_character = code & 0xFFFE == 0xFFFE
    return f"<U+{code:04X}>" if (unseen and not joiner) or never_a_character else character
