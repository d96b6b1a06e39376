"""What is refused when vLLM parses its configuration, before any worker starts."""

import json
import shutil

import pytest

from dialect_plugin.scheme import SchemeError
from tests.support.conversions import edit_config

OPTIONS = '{"lm_head": true}'


@pytest.mark.parametrize("nested", [False, True])
def test_an_output_projection_that_is_tied(nested):
    from transformers import LlamaConfig, LlavaConfig
    from vllm.config import VllmConfig

    from dialect_plugin.vllm.config import BlockDialectConfig

    text = LlamaConfig(tie_word_embeddings=True)
    config = LlavaConfig(text_config=text) if nested else text
    parsed = BlockDialectConfig.from_config_dict_json(OPTIONS)
    with pytest.raises(SchemeError, match="ties its output projection"):
        parsed.maybe_update_config("model", hf_config=config)
    untied = LlamaConfig(tie_word_embeddings=False)
    parsed.maybe_update_config("model", hf_config=untied)
    BlockDialectConfig.from_config_dict_json("{}").maybe_update_config("model", hf_config=config)
    assert "maybe_update_config" in VllmConfig._get_quantization_config.__code__.co_names


@pytest.mark.slow
def test_the_engine_s_configuration_is_refused(tiny_model, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    source = shutil.copytree(tiny_model(), tmp_path / "source")
    edit_config(source, tie_word_embeddings=True)
    arguments = EngineArgs(
        model=str(source),
        quantization="blockdialect",
        hf_overrides={"quantization_config_dict_json": json.dumps({"lm_head": True})},
    )
    with pytest.raises(ValueError, match="ties its output projection"):
        arguments.create_engine_config()
