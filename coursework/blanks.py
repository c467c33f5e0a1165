"""What the course grades, read from blanks.ini: the blanks of the student edition, and the rest."""

import configparser
from collections import namedtuple
from pathlib import Path

Graded = namedtuple("Graded", "name notebook points task hint check fills why")  # see blanks.ini
_table = configparser.ConfigParser(interpolation=None)
_table.read_string(Path(__file__).with_suffix(".ini").read_text("utf-8"))
GRADED = [
    Graded(name, **{field: " ".join(text.split()) for field, text in _table[name].items()})
    for name in _table.sections()
]
BLANKS = [graded for graded in GRADED if graded.check]
