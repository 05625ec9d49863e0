"""Long YAML files of our own, in blocks: what stood in an earlier one is neither spelt nor read anew.

    dead_ends:             one block: a key with its value, or with the first entry of its list
    - axis: lr ...
    - axis: steps ...      and one for each further entry

A policy with its 256 dead ends, of which two are new, takes libyaml 31 ms to write and 56 ms to read, every round; a
block that was met before takes a look-up. The text is the one that libyaml writes of the whole.
"""

import json
import re
from functools import lru_cache
from typing import Any

import yaml

from megatron_evolve.document import FLOAT, OWN_LOADER, parse_yaml

BLOCKS = 1024  # of 0.4 kB each: four registries of dead ends
_KEY, _ENTRY = re.compile(r"^(?=[^\s-])", re.MULTILINE), re.compile(r"^(?=- )", re.MULTILINE)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):
    """libyaml's, which writes the same text 8 times as fast; and quotes what the loader takes for a number.

    One candidate id in 300 is like 3206713938e6. Unquoted it came back as a number, and its policy as another one.
    """


_Dumper.add_implicit_resolver(*FLOAT)


def text_of(document: Any) -> str:
    """A JSON document as YAML, for people."""
    if not (isinstance(document, dict) and document and all(map(str.isidentifier, document))):
        return _text(json.dumps(document))  # keys of another kind take more than a line
    parts = []
    for key, value in document.items():
        first, rest = (value[:1], value[1:]) if isinstance(value, list) else (value, ())
        parts.append(_text(json.dumps({key: first})))
        parts += [_text(json.dumps([entry])) for entry in rest]
    return "".join(parts)


def value_in(text: str, *, where: str) -> dict[str, Any]:
    """The mapping in YAML text. Share it, don't change it: equal blocks of two texts may be one value.

    Text that `text_of` did not write is read as a whole where blocks make no sense of it; whoever needs to be certain
    compares digests. Raises ValueError with one sentence that starts with `where`.
    """
    found: dict[str, Any] = {}
    try:
        for block in filter(None, _KEY.split(text)):
            head, *entries = _ENTRY.split(block)
            ((key, value),) = _value(head + "".join(entries[:1])).items()
            found[key] = value + [entry for more in entries[1:] for entry in _value(more)] if entries[1:] else value
    except (yaml.YAMLError, AttributeError, TypeError, ValueError):
        return parse_yaml(text, where=where, loader=OWN_LOADER)
    return found or parse_yaml(text, where=where, loader=OWN_LOADER)


@lru_cache(maxsize=BLOCKS)
def _text(spelling: str) -> str:
    """YAML text of what is spelt in JSON."""
    return yaml.dump(json.loads(spelling), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


@lru_cache(maxsize=BLOCKS)
def _value(text: str) -> Any:
    return yaml.load(text, Loader=OWN_LOADER)
