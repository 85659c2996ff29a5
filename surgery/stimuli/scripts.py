"""Scripts, as Unicode names their letters."""

from __future__ import annotations

import unicodedata

_UNSPACED = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ")


def is_unspaced(character: str) -> bool:
    """Whether a character is of a script that is written without spaces between words."""
    return unicodedata.name(character, "").startswith(_UNSPACED)
