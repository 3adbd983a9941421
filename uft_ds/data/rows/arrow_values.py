"""Arrow's columns as the values that a row of JSON would have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from uft_ds.data.rows.json_rows import parse_json

if TYPE_CHECKING:
    import pyarrow as pa

_JSON = "arrow.json"
"""The extension type by which `datasets` 5 stores values of mixed keys, as JSON text."""


def column_values(column: pa.Array | pa.ChunkedArray, field: pa.Field) -> list[Any]:
    """The values of a column: structs without their null members, decimals as numbers, stored JSON decoded.

    A time that Python's datetime does not have (Postgres' `infinity`, nanoseconds) makes the times of its batch the
    integers that the file holds.

    Raises:
        ValueError: stored JSON is not valid.
    """
    try:
        values = column.to_pylist()
    except (OverflowError, ValueError, LookupError):  # a time zone that is not known is a LookupError
        column = column.cast(_times_as_integers(column.type))
        values = column.to_pylist()
    convert = _of_field(field)
    return values if convert is None else [None if value is None else convert(value) for value in values]


def _of_field(field: pa.Field) -> Callable[[Any], Any] | None:
    """As for `_converter`; pyarrow before 19 does not know the type, and only the field says that its text is JSON."""
    is_json = (field.metadata or {}).get(b"ARROW:extension:name") == _JSON.encode()
    return _decoded if is_json else _converter(field.type)


def _converter(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What makes a value of this type plain, given that it is not null; None if it is so already."""
    import pyarrow.types as kinds

    if getattr(kind, "extension_name", None) == _JSON:
        return _decoded  # null members are the data's own there
    if kinds.is_decimal(kind):
        return lambda value: int(value) if value == value.to_integral_value() else float(value)
    if kinds.is_struct(kind):
        members = {field.name: _of_field(field) or _itself for field in kind}
        # Arrow gives every struct the keys of all the others.
        return lambda value: {name: members[name](member) for name, member in value.items() if member is not None}
    if kinds.is_dictionary(kind) or kinds.is_run_end_encoded(kind):
        return _converter(kind.value_type)
    if hasattr(kind, "value_field"):  # a list of any kind
        convert = _of_field(kind.value_field)
        if convert is not None:
            return lambda value: [None if member is None else convert(member) for member in value]
    return None


def _decoded(text: str) -> Any:
    return parse_json(text.encode())


def _itself(value: Any) -> Any:
    return value


def _times_as_integers(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa
    import pyarrow.types as kinds

    if kinds.is_struct(kind):
        return pa.struct([_without_times(field) for field in kind])
    if kinds.is_large_list(kind):
        return pa.large_list(_without_times(kind.value_field))
    if kinds.is_fixed_size_list(kind):
        return pa.list_(_without_times(kind.value_field), kind.list_size)
    if kinds.is_list(kind):
        return pa.list_(_without_times(kind.value_field))
    if kinds.is_date32(kind) or kinds.is_time32(kind):
        return pa.int32()
    if kinds.is_temporal(kind) and not kinds.is_interval(kind):
        return pa.int64()
    return kind


def _without_times(field: pa.Field) -> pa.Field:
    return field.with_type(_times_as_integers(field.type))
