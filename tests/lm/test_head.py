from collections.abc import Callable
from typing import Any

from luthier.lm.head import head_weight

ModelMaker = Callable[..., Any]


def test_head_weight_is_the_embedding_where_tied(tiny_model: ModelMaker) -> None:
    model = tiny_model()
    assert head_weight(model) is model.base_model.embed_tokens.weight
    assert head_weight(tiny_model(tie_word_embeddings=False)).shape == (97, 32)
