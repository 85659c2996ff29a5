"""Makes the dictionary of `word_pass_rate` of a plain list of words, one a line.

    python tools/make_english_words.py web2

The list is `web2` of FreeBSD (`share/dict/web2`, revision 326913): Webster's Second International
Dictionary of 1934, whose copyright has lapsed. Words that never count, those with a capital or of
fewer than four letters, are left out; the same list always gives the same bytes.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

from surgery.metrics import word_pass_rate

TARGET = Path(word_pass_rate.__file__).with_name(word_pass_rate.DICTIONARY)


def main(source: Path) -> None:
    words = word_pass_rate.english(source.read_text(encoding="utf-8").split("\n"))
    text = "".join(f"{word}\n" for word in sorted(words))
    TARGET.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{TARGET}: {len(words)} words, {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
