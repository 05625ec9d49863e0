"""Megatron keeps some state for the whole process; a test begins without another's."""

import sys

import pytest


@pytest.fixture(autouse=True)
def own_heads() -> None:
    """The tracker of prediction heads' losses is as long as the first model that wrote into it has heads."""
    module = sys.modules.get("megatron.core.transformer.multi_token_prediction")
    if module is not None:
        module.MTPLossLoggingHelper.tracker.clear()
