"""config.json: strict JSON of finite numbers, of a model that can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import InvalidArgument
from luthier.lm.model_config import check_config, read_config, read_object

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"rope_theta": NaN}', "config.json: rope_theta must be a finite number, got nan"),
        (
            '{"rope_parameters": {"full": {"factor": [1.0, -Infinity]}}}',
            "rope_parameters.full.factor[1] must be",
        ),
        ('{"rms_norm_eps": 1e999}', "config.json: rms_norm_eps must be a finite number, got inf"),
        ('{"a": ' * 2000 + "1" + "}" * 2000, "config.json must be JSON, got RecursionError"),
        ("[1]", "config.json must hold an object, got list"),
        ("lk_secret", "config.json must be JSON, got Expecting value at line 1"),
        ('{"a": "\\ud800"}', None),
        ("1" * 5000, "config.json must be JSON, got ValueError"),
    ],
)
def test_read_config_is_strict(tmp_path: Path, text: str, said: str | None) -> None:
    (tmp_path / "config.json").write_text(text)
    if said is None:
        assert read_config(tmp_path)
        return
    with pytest.raises(InvalidArgument) as caught:
        read_config(tmp_path)
    assert caught.value.reason == "MODEL_INVALID"
    assert said in caught.value.message
    assert "lk_secret" not in caught.value.message


def test_read_object_names_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(
        InvalidArgument, match=r"generation_config\.json must be JSON, got UnicodeDecodeError"
    ):
        read_object(tmp_path / "generation_config.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_theta": 0}, "rope_theta must be a positive finite number, got 0"),
        ({"rope_theta": -1e4}, "rope_theta must be a positive finite number, got -10000.0"),
        ({"rope_theta": "10000"}, "rope_theta must be a positive finite number, got str"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "rope_scaling.factor must be a positive"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 0.0}}},
            "rope_parameters.full_attention.rope_theta",
        ),
        ({"rope_scaling": {"long_factor": [1.0, 0.0]}}, "rope_scaling.long_factor[1] must be a positive"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a positive"),
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers must be a whole number in 1..10000, got 1000000000",
        ),
        ({"hidden_size": -32}, "hidden_size must be a whole number"),
        ({"vocab_size": 97.5}, "vocab_size must be a whole number"),
        ({"vocab_size": True}, "vocab_size must be a whole number in 1..100000000, got bool"),
        ({"num_key_value_heads": 3}, "must be a multiple of 3 key-value heads, got 4"),
        ({"architectures": "LlamaForCausalLM"}, "the architecture must be one of"),
        ({"architectures": [{"secret": 1}]}, "got list"),
    ],
)
def test_check_config_refuses_what_no_model_has(change: dict[str, Any], said: str) -> None:
    check_config(PLAIN)
    with pytest.raises(InvalidArgument) as caught:
        check_config(PLAIN | change)
    assert caught.value.reason == "MODEL_INVALID"
    assert said in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale_all_dim": 0, "truncate": False}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000}}},
        {"sliding_window": 4096, "head_dim": None, "num_key_value_heads": None},
    ],
)
def test_check_config_accepts_what_models_have(change: dict[str, Any]) -> None:
    check_config(json.loads(json.dumps(PLAIN | change)))
