"""Random sides and shapes that fit together."""

from __future__ import annotations

from hypothesis import strategies as st

from etha_ray.layout import Layout

Case = tuple[str, str, tuple[int, ...]]


@st.composite
def cases(draw: st.DrawFn, most_dims: int = 3) -> Case:
    """Source and target layouts as text, and a shape; a source may be Partial."""
    shape = tuple(draw(st.lists(st.integers(0, 20), max_size=most_dims)))
    return _layout(draw, len(shape), partial=True), _layout(draw, len(shape), partial=False), shape


def _layout(draw: st.DrawFn, ndim: int, partial: bool) -> str:
    mesh = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    dims = range(-ndim, ndim)
    tokens = ["R", *(f"S{dim}" for dim in dims), *(f"SS{dim}/2" for dim in dims), *(["P(sum)"] if partial else [])]
    return Layout(tuple(mesh), tuple(draw(st.sampled_from(tokens)) for _ in mesh)).encode()
