"""Megatron keeps some state for the whole process; a test begins without another's."""

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def own_heads() -> None:
    """The tracker of prediction heads' losses is as long as the first model that wrote into it has heads; and a trainer
    leaves the weight that its last micro-batch gave them."""
    module = sys.modules.get("megatron.core.transformer.multi_token_prediction")
    if module is not None:
        module.MTPLossLoggingHelper.tracker.clear()
        module.MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
