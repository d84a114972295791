"""Other names for a row's fields: `--columns image=photo,question=prompt` reads `photo` as `image`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace

from adapters.data.formats.columnar import CLASS_QUESTION
from adapters.data.formats.raw_rows import RawRow, shorten
from qformer.errors import UserError

READ = (
    "image", "images", "file_name", "question", "answer", "answers", "caption", "captions", "choices", "context",
    "rationale", "id", "question_id", "language", "kind", "steps", "messages", "conversations", "texts", "instruction",
    "input", "output", "system", "history",
)  # fmt: skip
"""The fields of a row that are read."""
_ASKS = {"question", "answer", "answers", "caption", "captions", "messages", "conversations", "texts", "instruction"}


def parse_columns(text: str) -> dict[str, str]:
    """The pairs of `--columns`: a field of ours and the column that is read as it.

    Raises:
        UserError: it is not of the form field=column,…, or names a field that is not read or twice.
    """
    found: dict[str, str] = {}
    for pair in text.split(","):
        field, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not field or not column:
            raise UserError(f"--columns {text}: write field=column pairs, such as image=photo,question=prompt")
        if field in found:
            raise UserError(f"--columns {text}: '{field}' is there twice: keep one")
        found[field] = column
    check_columns(found)
    return found


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise UserError if a field is not read at all, or two fields are to be read from one column."""
    for field in columns:
        if field not in READ:
            near = difflib.get_close_matches(field, READ, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"take one of {', '.join(READ)}"
            raise UserError(f"--columns {field}={columns[field]}: no field is called '{field}'; {hint}")
    if len(set(columns.values())) < len(columns):
        raise UserError(f"--columns reads one column as two fields ({', '.join(columns)}): name another for one")


def named_rows(rows: Iterator[RawRow], columns: Mapping[str, str]) -> Iterator[RawRow]:
    """Rows under the names of our fields; a class with a name, and no question, answers what the picture is.

    Args:
        rows: as the file has them.
        columns: the file's name of a field, by ours.

    Raises:
        UserError: after the last row, a column was in none of them.
    """
    check_columns(columns)
    search = _Search(columns)
    for row in rows:
        search.look(row)
        yield _class_answered(_named(row, columns) if columns else row)
    search.end()


def look_for_columns(rows: Iterator[RawRow], columns: Mapping[str, str]) -> None:
    """See that a file has the columns, before only the first of its rows are read.

    Raises:
        UserError: a column is in none of the rows.
    """
    search = _Search(columns)
    for row in rows:
        search.look(row)
        if not search.unseen:
            return
    search.end()


class _Search:
    """Which columns have been seen so far."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.unseen = set(columns.values())
        self._seen: dict[str, None] = {}

    def look(self, row: RawRow) -> None:
        if len(self._seen) < 50:
            self._seen |= dict.fromkeys(map(str, row.fields))
        self.unseen -= row.fields.keys()

    def end(self) -> None:
        """Raise UserError if a column was in none of the rows."""
        if self.unseen and self._seen:
            names, found = ", ".join(sorted(self.unseen)), shorten(", ".join(self._seen), 100)
            raise UserError(f"--columns: no row has '{names}' (found: {found}): correct the name")


def _named(row: RawRow, columns: Mapping[str, str]) -> RawRow:
    if row.problem is not None:
        return row
    theirs = {column: field for field, column in columns.items()}
    # an empty cell is an absent field, though a table's rows have an empty question if they have none
    given = {
        name: value
        for name, value in row.fields.items()
        if value != "" or name in theirs or columns.get(name) not in row.fields
    }
    fields = {theirs.get(name, name): value for name, value in given.items()}
    if len(fields) < len(given):
        for field, column in columns.items():
            if field in given and column in given and field not in theirs:
                problem = f"the row has '{field}' beside '{column}', which --columns reads as it: keep one of them"
                return replace(row, fields={}, problem=problem)
    label = next((field for field, column in columns.items() if column == row.label), row.label)
    return replace(row, fields=fields, label=label)


def _class_answered(row: RawRow) -> RawRow:
    if row.label is None or row.label not in row.fields or _ASKS & (row.fields.keys() - {row.label}):
        return row
    fields = dict(row.fields)
    fields["answer"] = fields.pop(row.label)
    return replace(row, fields={**fields, "question": CLASS_QUESTION})
