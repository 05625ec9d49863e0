"""YAML in: one document of an operator's or a researcher's file, read by the safe loader.

PyYAML follows YAML 1.1, where `1e-5` is text; researchers write learning rates that way, so such text is read as the
number it is. Errors are one sentence with the line.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from megatron_evolve.substrate.frozen import nearest


class _Loader(yaml.SafeLoader):
    """Safe loader that also knows YAML 1.2's floats, and refuses a key written twice and text that no UTF-8 has."""

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        value = super().construct_scalar(node)
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise yaml.constructor.ConstructorError(
                None, None, "expected whole characters, got half of a surrogate pair", node.start_mark
            )
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "expected a single value as key", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
_Loader.add_implicit_resolver(*FLOAT)


# For files that the loop itself wrote, of which a policy with its dead ends grows long: libyaml reads them 7 times as
# fast, and says less about a person's slip.
OWN_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def find_yaml(name: str, shipped: Path, what: str) -> Path:
    """Path of a YAML file: a path that exists, or the name of one that is shipped in that folder."""
    path = Path(name)
    if path.is_file():
        return path
    found = shipped / f"{path.name}.yaml"
    if found.is_file():
        return found
    known = [file.stem for file in sorted(shipped.glob("*.yaml"))]
    raise ValueError(
        f"no {what} {name!r}: expected the path of a YAML file or a shipped name{nearest(path.name, known)}"
    )


def load_yaml(path: Path | str, loader: type = _Loader) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ValueError with one sentence for anything else."""
    return parse_yaml(read_text(path), where=str(path), loader=loader)


def read_text(path: Path | str) -> str:
    """The text of a YAML file. Raises ValueError with one sentence where there is none to read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8 text, got other bytes; save the file as UTF-8") from None


def parse_yaml(text: str, *, where: str, loader: type = _Loader) -> dict[str, Any]:
    """The mapping in YAML text. Raises ValueError with one sentence that starts with `where`."""
    try:
        document = yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{where}: not valid YAML{line}: {problem}; fix the line") from None
    except RecursionError:
        raise ValueError(f"{where}: expected keys and values, got hundreds of levels of them; nest them less") from None
    except (ValueError, KeyError, AttributeError) as error:  # PyYAML's, of a date, number or boolean that is none
        problem = str(error).split(";")[0] if isinstance(error, ValueError) else "a value that its tag has none of"
        raise ValueError(f"{where}: not valid YAML: {problem}; fix or quote the value") from None
    if not isinstance(document, dict):
        kind = "an empty document" if document is None else type(document).__name__
        raise ValueError(f"{where}: expected keys and values, got {kind}; see `megatron-evolve schema`")
    return document
