"""The length at which attention costs as much as the rest, against parameters counted in the model itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from uft_ds.architectures.facts import attention_parity
from uft_ds.streams.load import empty_base


def test_parity_is_a_layers_weights_over_its_queries(folder: Path) -> None:
    """2 FLOPs a weight and token against 2 q T: equal at T = weights of a layer's projections / q, all models."""
    model = empty_base(AutoConfig.from_pretrained(folder))
    layer = model.get_decoder().layers[0]
    weights = sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))
    attention = layer.attention if hasattr(layer, "attention") else layer.self_attn
    # Query, key and value are one projection in some families; what leads out of attention is as wide as the queries.
    output = attention.dense if hasattr(attention, "dense") else attention.o_proj
    assert attention_parity(model.config) == weights / output.in_features


def test_parity_by_hand() -> None:
    """d = 64, f = 96, 4 query heads and 2 key-value heads of 16: (8192 + 4096 + 18432) / 64 = 480 tokens.

    A head_dim of 32 doubles q and k: (16384 + 8192 + 18432) / 128 = 336.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert attention_parity(PretrainedConfig(**sizes)) == 480
    assert attention_parity(PretrainedConfig(**sizes, head_dim=32)) == 336


@pytest.mark.parametrize("missing", ["hidden_size", "intermediate_size", "num_attention_heads"])
def test_parity_of_an_unknown_layout_is_infinite(missing: str) -> None:
    """Where a size is missing, cost is taken as linear in tokens."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    assert attention_parity(PretrainedConfig(**{k: v for k, v in sizes.items() if k != missing})) == math.inf


def test_without_key_value_heads_each_query_head_has_its_own() -> None:
    """d = 64, f = 96, 4 heads of 16: (8192 + 8192 + 18432) / 64 = 544."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    assert attention_parity(PretrainedConfig(**sizes)) == 544
