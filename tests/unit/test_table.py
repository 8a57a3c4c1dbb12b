"""The plain table of lists and queries."""

from __future__ import annotations

from keepshot.table import format_table


def test_columns_line_up_also_under_wide_characters() -> None:
    table = format_table(["word", "n"], [["ab", 1], ["\u6c34\u6c34\u6c34", None], ["a\nb", 22]])
    assert table.splitlines() == ["word    n", "ab      1", "\u6c34\u6c34\u6c34", "a b     22"]


def test_the_last_column_wraps_where_a_width_is_given() -> None:
    table = format_table(["name", "text"], [["x", "one two three four five six seven"]], width=26)
    assert table.splitlines() == [
        "name  text", "x     one two three four", "      five six seven",
    ]  # fmt: skip
