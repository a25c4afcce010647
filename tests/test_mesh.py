"""A mesh numbers its ranks row by row, and its lines cover it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipar import Mesh

sizes = st.integers(1, 4)
meshes = st.builds(Mesh, dp=sizes, pp=sizes, ep=st.integers(1, 2), cp=st.integers(1, 2), tp=sizes)
AXES = ["dp", "pp", "ep", "cp", "tp"]


def test_an_example():
    mesh = Mesh(dp=2, pp=2, tp=2)
    assert mesh.coordinate(5) == {"dp": 1, "pp": 0, "ep": 0, "cp": 0, "tp": 1}
    assert mesh.line("dp", 5) == (1, 5) and mesh.line("pp", 5) == (5, 7) and mesh.line("tp", 5) == (4, 5)
    assert mesh.line("cp", 5) == (5,)
    assert mesh.lines("pp") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert str(mesh) == "Mesh(dp=2, pp=2, tp=2)"


@given(meshes)
def test_data_is_outermost_and_tensor_innermost(mesh):
    assert list(mesh.shape) == AXES
    places = [tuple(mesh.coordinate(rank).values()) for rank in range(mesh.size)]
    assert places == sorted(places)
    assert len(set(places)) == mesh.size == mesh.dp * mesh.pp * mesh.ep * mesh.cp * mesh.tp
    assert all(0 <= i < n for place in places for i, n in zip(place, mesh.shape.values(), strict=True))


@given(meshes, st.sampled_from(AXES), st.data())
def test_a_line_differs_along_one_axis_only(mesh, axis, data):
    rank = data.draw(st.integers(0, mesh.size - 1))
    line = mesh.line(axis, rank)
    assert len(line) == mesh.shape[axis]
    assert [mesh.coordinate(r)[axis] for r in line] == list(range(len(line)))
    assert line[mesh.coordinate(rank)[axis]] == rank
    rest = {name: place for name, place in mesh.coordinate(rank).items() if name != axis}
    assert all({n: i for n, i in mesh.coordinate(r).items() if n != axis} == rest for r in line)
    assert all(mesh.line(axis, r) == line for r in line)


@given(meshes, st.sampled_from(AXES))
def test_the_lines_of_an_axis_cover_the_mesh_once(mesh, axis):
    lines = mesh.lines(axis)
    assert sorted(rank for line in lines for rank in line) == list(range(mesh.size))


def test_a_mesh_is_a_value():
    assert Mesh(dp=2) == Mesh(dp=2) != Mesh(tp=2) and len({Mesh(dp=2), Mesh(dp=2)}) == 1
    with pytest.raises(AttributeError):
        Mesh(dp=2).dp = 3


@pytest.mark.parametrize("size", [0, -1, 1.0, "2", None])
def test_an_axis_has_a_whole_number_of_ranks(size):
    with pytest.raises(ValueError, match="at least 1"):
        Mesh(pp=size)
