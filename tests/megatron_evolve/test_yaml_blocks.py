"""YAML in blocks: the text is libyaml's own of the whole, and what is read is what libyaml reads of the whole."""

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_evolve.artefacts import load_yaml_checked, save_yaml
from megatron_evolve.document import OWN_LOADER
from megatron_evolve.yaml_blocks import _Dumper, text_of, value_in

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(
        ["- x", "a: b", "3206713938e6", "1e-5", "# no comment", "long " * 40, "line\n- line\nkey: line\n"]
    )
)
VALUES = st.recursive(SCALARS, lambda of: st.lists(of, max_size=4) | st.dictionaries(st.text(), of, max_size=4))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_text_and_value_are_those_of_the_whole(document: dict) -> None:
    text = text_of(document)
    assert text == yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    if document:
        found = value_in(text, where="text")
        assert json.dumps(found) == json.dumps(yaml.load(text, Loader=OWN_LOADER))


def test_what_a_person_wrote_anew_is_read_as_a_whole(tmp_path) -> None:
    """Other spellings of a value have its digest; another value is refused, and no YAML is told with its line."""
    path, document = tmp_path / "policy.yaml", {"round": 3, "dead_ends": [{"axis": "lr"}, {"axis": "steps"}]}
    digest = save_yaml(path, document)
    for text in (
        "# mended\nround: 3\ndead_ends:\n  - {axis: lr}\n  - {axis: steps}\n",
        '{"round": 3,\n"dead_ends": [{"axis": "lr"},\n{"axis": "steps"}]}',
        "---\nround: 3\n\ndead_ends:\n- axis: lr\n\n- axis: steps\n",
    ):
        path.write_text(text)
        assert load_yaml_checked(path, digest) == document
    path.write_text("round: 3\ndead_ends:\n- axis: lr\n- axis: style\n")
    with pytest.raises(ValueError, match="is not what the ledger recorded"):
        load_yaml_checked(path, digest)
    path.write_text("round: 3\ndead_ends: [\n")
    with pytest.raises(ValueError, match=r"not valid YAML in line \d+"):
        load_yaml_checked(path, digest)
