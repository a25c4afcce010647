"""What an answer uses, as checks of exercises ask for it, and how they tell of an error in it."""

import sys
from types import ModuleType

import pytest

from minipar import one_f_one_b
from minipar.course.checks import _told, names_in

# Ways to have the package's one_f_one_b do the work of `answer`.
BORROWED = """
# another name
from minipar import one_f_one_b as x
def answer(): return x(2, 2)

# a variable
import minipar
x = minipar.one_f_one_b
def answer(): return x(2, 2)

# a string
import minipar as m
def answer(): return getattr(m, "one_f" + "_one_b")(2, 2)

# importlib
from importlib import import_module as i
def answer(): return i("minipar").one_f_one_b(2, 2)

# a dict
from minipar.schedule import SCHEDULES as x
def answer(): return x["1f1b"](2, 2)

# a default
import minipar
def answer(f=[minipar.one_f_one_b]): return f[0](2, 2)

# a partial
from functools import partial
from minipar import one_f_one_b as x
answer = partial(x, 2, 2)

# a cache
from functools import cache
@cache
def answer():
    from minipar import one_f_one_b
    return one_f_one_b(2, 2)

# a class
import minipar
class A: f = staticmethod(minipar.one_f_one_b)
def answer(): return A.f(2, 2)

# a base of a class
import minipar
class A: f = staticmethod(minipar.one_f_one_b)
class B(A): pass
def answer(): return B.f(2, 2)

# a method
class A:
    def f(self):
        import minipar
        return minipar.one_f_one_b(2, 2)
answer = A().f

# an object
class A:
    def __call__(self):
        import minipar
        return minipar.one_f_one_b(2, 2)
answer = A()

# a property
class A:
    @property
    def f(self):
        import minipar
        return minipar.one_f_one_b(2, 2)
a = A()
def answer(): return a.f

# a closure
def make():
    from minipar import one_f_one_b as x
    class A: f = staticmethod(x)
    return lambda: A.f(2, 2)
answer = make()
"""


@pytest.fixture
def notebook(monkeypatch):
    """The names of a notebook, as a kernel has them."""
    module = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    return module


@pytest.mark.parametrize("way", BORROWED.strip().split("\n\n"), ids=lambda way: way.splitlines()[0])
def test_what_an_answer_has_the_package_do_is_among_its_names(way, notebook):
    exec(way, vars(notebook))
    assert notebook.answer() == one_f_one_b(2, 2)
    assert "one_f_one_b" in names_in(notebook.answer)


def test_names_are_the_answers_own_and_those_of_what_it_calls_in_its_notebook(notebook):
    source = """
import math
from minipar import Mesh, gpipe
two = 2
def half(x): return math.floor(x / two)
def answer(x): return half(x), Mesh(dp=x)
"""
    exec(source, vars(notebook))
    assert names_in(notebook.answer) == {"half", "Mesh", "math", "floor", "two"}


def test_a_function_that_calls_itself_is_told_in_a_line():
    def again(x):
        return again(x)

    with pytest.raises(RecursionError) as failed:
        again(1)
    first, *lines = _told(failed.value).splitlines()
    assert first.startswith("RecursionError")
    assert len(lines) == 1 and "return again(x) (9" in lines[0]
