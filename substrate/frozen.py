"""The base of every value that crosses a room: frozen, complete, and deaf to unknown keys.

Pydantic's own messages name the field but not the remedy, so `parse` turns the first problem of a document into one
sentence: where, what was expected, what came, and the nearest real name of a misspelt key.
"""

import difflib
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError


class Frozen(BaseModel):
    """An immutable record. Unknown keys, non-finite numbers and half-filled records are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    @classmethod
    def parse(cls, data: Any, *, where: str) -> Self:
        """`data` as this record. Raises ValueError with one sentence that starts with `where`."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ValueError(f"{where}: {_sentence(cls, error)}") from None

    def replace(self, **changes: Any) -> Self:
        """A new record with these fields changed, checked like any other."""
        return type(self).model_validate({**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean X?`, or the list of known names when nothing is near."""
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(sorted(known))}"


def _sentence(cls: type[BaseModel], error: ValidationError) -> str:
    # A misspelt key also leaves the right one missing: the misspelling is what to mend.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    path = ".".join(str(part) for part in first["loc"]) or "document"
    more = f" ({error.error_count() - 1} more problem(s) after this one)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(cls, first["loc"][:-1])
        return f"unknown key {path!r}{nearest(str(first['loc'][-1]), known) if known else ''}{more}"
    if first["type"] == "missing":
        return f"{path} is missing: {_meaning(cls, first['loc'])}{more}"
    message = first["msg"].removeprefix("Value error, ")
    # A validator of ours says a whole sentence, with what it got and the remedy.
    got = "" if first["type"] == "value_error" else f", got {_brief(first.get('input'))}"
    return f"{path}: {message[0].lower() + message[1:]}{got}{more}"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _model_at(cls: type[BaseModel], path: tuple) -> type[BaseModel] | None:
    models: list[type[BaseModel]] = [cls]
    for part in path:
        # Pydantic names the member of a tagged union by its `kind`, as if that were one more field.
        tagged = [one for one in models if "kind" in one.model_fields and part in _literals(one)]
        found = [one.model_fields[part].annotation for one in models if part in one.model_fields]
        models = tagged or [model for annotation in found for model in _models_in(annotation)]
    return models[0] if models else None


def _literals(model: type[BaseModel]) -> tuple:
    return getattr(model.model_fields["kind"].annotation, "__args__", ())


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]


def _fields_at(cls: type[BaseModel], path: tuple) -> list[str]:
    model = _model_at(cls, path)
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _meaning(cls: type[BaseModel], path: tuple) -> str:
    model = _model_at(cls, path[:-1])
    field = model.model_fields.get(str(path[-1])) if model else None
    return field.description if field and field.description else "give it a value"
