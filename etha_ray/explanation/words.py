"""The sentences about a plan as a picture, to stand beside the others in one image."""

from __future__ import annotations

from etha_ray.explanation.numbers import PlanNumbers
from etha_ray.explanation.picture import Label, Mark, Picture, wrapped
from etha_ray.explanation.text import assumption, sentences

WIDTH = 400.0
_INDENT = 64.0
_SIZE = 12.0
_LINE = 18.0


def words(numbers: PlanNumbers) -> Picture:
    """What `text.sentences` says, in lines."""
    marks: list[Mark] = [Label(0, 14, "In numbers", 14, bold=True)]
    y = 36.0
    for word, sentence in sentences(numbers):
        marks.append(Label(0, y, word, _SIZE, fill="faint"))
        for line in wrapped(sentence, WIDTH - _INDENT, _SIZE):
            marks.append(Label(_INDENT, y, line, _SIZE))
            y += _LINE
    for line in wrapped(assumption(numbers), WIDTH, 10) if numbers.between_hosts else []:
        marks.append(Label(0, y, line, 10, fill="faint"))
        y += 14
    return Picture("In numbers", WIDTH, y, tuple(marks))
