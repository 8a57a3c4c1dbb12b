"""The plain table of lists and queries."""

from __future__ import annotations

from keepshot.table import format_table


def test_columns_line_up_also_under_wide_characters() -> None:
    table = format_table(["word", "n"], [["ab", 1], ["\u6c34\u6c34\u6c34", None], ["a\nb", 22]])
    assert table.splitlines() == ["word    n", "ab      1", "\u6c34\u6c34\u6c34", "a b     22"]


def test_what_a_model_wrote_gives_the_terminal_no_orders() -> None:
    table = format_table(["arm", "a\x1b[2Jb"], [["plain", "a\x1b]0;title\x07\u202eb"]])
    assert table.splitlines() == [
        "arm    a\u241b[2Jb", "plain  a\u241b]0;title\u2407<U+202E>b",
    ]  # fmt: skip


def test_the_last_column_wraps_where_a_width_is_given() -> None:
    table = format_table(["name", "text"], [["x", "one two three four five six seven"]], width=26)
    assert table.splitlines() == [
        "name  text", "x     one two three four", "      five six seven",
    ]  # fmt: skip
