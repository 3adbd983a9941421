"""A base without a sequence classifier is refused by the whole sentence that transformers says of it."""

from __future__ import annotations

import pytest
from transformers import GraniteConfig

from uft_ds.errors import UserError
from uft_ds.streams.classifier import empty_classifier


def test_a_base_without_a_classifier_is_refused_in_whole_words() -> None:
    """Transformers names the config's class in more than 120 letters, and then all model types that have one."""
    with pytest.raises(UserError) as refused:
        empty_classifier(GraniteConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    assert str(refused.value) == (
        "objective.reward: head needs a sequence classifier of transformers to be converted to, and Granite has none "
        "(Unrecognized configuration class <class 'transformers.models.granite.configuration_granite.GraniteConfig'> "
        "for this kind of AutoModel: AutoModelForSequenceClassification); take a model.base of another architecture"
    )
