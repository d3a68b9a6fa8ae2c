"""Write conf/eval/classes/emoji_val.yaml, the classes of zero-shot evaluation on the emoji's split ``val``.

Run as ``python -m tools.emoji_classes`` in the repository root after a change of the embedded data.
"""

from __future__ import annotations

import json
from pathlib import Path

from repr.data.sources.emoji import Emoji

TARGET = Path(__file__).parents[1] / "conf" / "eval" / "classes" / "emoji_val.yaml"
HEAD = """\
# The concepts of the emoji's split `val`, none of them trained on. Written by tools/emoji_classes.py.
attribute: concept
templates:  # {} is the name
  - "{}"
names:
"""


def class_file(split: str) -> str:
    """The YAML text for one split: concept -> caption, every string quoted (ids such as 1e10 would be numbers)."""
    source = Emoji(split)
    names = {concept: source.captions(row)[0] for row, concept in enumerate(source.attributes["concept"])}
    quoted = [(json.dumps(text, ensure_ascii=False) for text in pair) for pair in sorted(names.items())]
    return HEAD + "".join(f"  {concept}: {name}\n" for concept, name in quoted)  # a JSON string is a YAML string


if __name__ == "__main__":
    TARGET.write_text(class_file("val"), encoding="utf-8")
