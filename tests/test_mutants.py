"""make mutants: what it changes, and that a changed module is what its tests import."""

import os
import textwrap

from tests.mutants.__main__ import put_in_place
from tests.mutants.mutate import mutants

SOURCE = textwrap.dedent('''
    """A module with a number in its docstring: 3."""

    LIMIT = 10

    @named("x", 5)
    def nearest(values: list[int], *, most: int = LIMIT) -> int | None:
        """At most 7."""
        assert values, "none at all"
        if not 0 < len(values) <= most:
            raise ValueError(f"{len(values)} of 9")
        kept = sorted(values, reverse=True)
        return min(value for value in kept if value > 1)
''')


def test_each_mutant_changes_one_place_that_is_not_only_for_people():
    found = [each.name.removeprefix("m.py ") for each in mutants(SOURCE, "m.py")]
    assert found == [
        "module: 10 -> 11",
        "nearest: not 0 < len(values) <= most -> 0 < len(values) <= most",
        "nearest: 0 < len(values) <= most -> 0 <= len(values) <= most",
        "nearest: 0 < len(values) <= most -> 0 < len(values) < most",
        "nearest: 0 -> 1",
        "nearest: raise ValueError -> pass",
        "nearest: sorted(values, reverse=True) -> sorted(values)",
        "nearest: True -> False",
        "nearest: return min((value for value in kept if value > 1)) -> return None",
        "nearest: min((value for value in kept if value > 1)) -> max((value for value in kept if value > 1))",
        "nearest: for ... in kept if value > 1 -> for ... in kept",
        "nearest: value > 1 -> value >= 1",
        "nearest: 1 -> 2",
    ]


def test_mutants_that_read_alike_have_names_of_their_own():
    found = mutants("def f(a):\n    return (a + 1) * (a + 1)\n", "m.py")
    assert len({each.name for each in found}) == len(found)
    assert [each.name for each in found if "a + 1 -> a - 1" in each.name][1].endswith(" #2")


def test_one_mutant_leaves_nothing_behind_for_the_next():
    values = []
    for each in mutants("x = 2 + 3", "m.py"):
        names: dict[str, int] = {}
        exec(each.compiled("m.py"), names)
        values.append(names["x"])
    assert values == [2 - 3, 3 + 3, 2 + 4]


def test_a_module_that_is_imported_is_the_mutant_and_its_file_stays_as_it_is(tmp_path):
    (tmp_path / "module_to_mutate.py").write_text("def f():\n    return 1 + 1\n")
    (minus, *_) = [each for each in mutants("def f():\n    return 1 + 1\n", "m.py") if "1 - 1" in each.name]
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    else:
        code = 1
        try:
            import sys

            sys.path.insert(0, str(tmp_path))
            put_in_place(tmp_path / "module_to_mutate.py", minus.compiled("m.py"))
            import module_to_mutate

            code = module_to_mutate.f()
        finally:
            os._exit(code)
    assert "1 + 1" in (tmp_path / "module_to_mutate.py").read_text()
