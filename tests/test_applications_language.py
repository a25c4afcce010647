"""Chapters 06a and 06b: number words and log-mel against what is known of them; and both on real data, where it is."""

import pytest
from excerpts import DATA, ROOT, defined, with_data

from minipar.course import build


def test_number_words_are_what_grammars_say():
    found = defined("06a_language", "chinese", "value")
    known = {
        0: "零", 7: "七", 10: "十", 14: "十四", 20: "二十", 99: "九十九", 100: "一百", 101: "一百零一", 110: "一百一十",
        115: "一百一十五", 1000: "一千", 1001: "一千零一", 1010: "一千零一十", 1100: "一千一百", 2020: "二千零二十",
        10000: "一万", 10001: "一万零一", 10010: "一万零一十", 10305: "一万零三百零五", 11000: "一万一千",
        40500: "四万零五百", 70070: "七万零七十", 100000: "十万", 120000: "十二万", 305102: "三十万五千一百零二",
        1000500: "一百万零五百", 20000000: "二千万", 99999999: "九千九百九十九万九千九百九十九",
    }  # fmt: skip
    assert {number: found["chinese"](number) for number in known} == known
    assert {number: found["value"](words) for number, words in known.items()} == {number: number for number in known}
    assert all(found["value"](found["chinese"](n)) == n for n in range(99_000_000, 99_020_000))


@pytest.mark.parametrize(
    "name, switch, folder",
    [("06a_language", "REVIEWS", "reviews"), ("06b_speech", "RECORDINGS", "spoken_digits")],
)
def test_the_chapter_runs_on_real_data(name, switch, folder):
    if not (DATA / folder).exists():
        pytest.skip(f"{folder} are not here")
    notebook = with_data(name, switch, DATA / folder)
    build.run(notebook, ROOT / "chapters")
    assert build.problems(notebook) == []
