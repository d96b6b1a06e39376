"""Quantized transformers through diffusers' own save_pretrained and from_pretrained."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import PipelineQuantizationConfig, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file

import diffusers_hook
from diffusers_hook import ConfigError, SemanticDialectConfig
from diffusers_hook.layers.dialect import DialectLinear
from diffusers_hook.model.attach import attached
from tests.video.support.tiny_video import generate, run, wan, wan_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    wan().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(plain, tmp_path):
    model = WanTransformer3DModel.from_pretrained(plain)
    diffusers_hook.enable(model, progress=False, seda=True, salient_fraction=0.25)
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def assert_same(first, second):
    left, right = first.state_dict(), second.state_dict()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_a_saved_model_comes_back_with_its_bytes_and_its_configuration(saved):
    model, folder = saved
    loaded = WanTransformer3DModel.from_pretrained(folder)
    assert_same(model, loaded)
    assert torch.equal(run(model), run(loaded))
    found = diffusers_hook.summary(loaded).transformers[0]
    assert found.originals == "none"
    assert found.layers == 20
    # the first call's attn1.to_q, to_k and to_v come before the first choice: 5 of 8 layers
    assert found.salient_share == 0.25 * 5 / 8


def test_a_rotated_model_comes_back_with_its_rotation(plain, tmp_path):
    options = {"rotation": "hadamard_32", "seda": True, "salient_fraction": 0.25}
    model = WanTransformer3DModel.from_pretrained(plain)
    diffusers_hook.enable(model, progress=False, **options)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (config["format_version"], config["rotation"]) == (2, "hadamard_32")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "saved")
    assert_same(model, loaded)
    video = run(model)
    assert torch.equal(run(loaded), video)
    config = SemanticDialectConfig(**options)
    online = WanTransformer3DModel.from_pretrained(plain, quantization_config=config)
    assert torch.equal(run(online), video)
    diffusers_hook.enable(loaded, progress=False, salient_fraction=0.5)  # rotation is kept
    assert not torch.equal(run(loaded), video)
    with pytest.raises(ConfigError, match="rotation: 'none' needs other weights than those loaded"):
        diffusers_hook.enable(loaded, progress=False, rotation="none")


def test_the_file_says_what_holds_and_is_of_version_1_where_that_can_say_it(saved, tmp_path):
    def stored(folder):
        return json.loads((folder / "config.json").read_text())["quantization_config"]

    config = stored(saved[1])
    assert (config["format_version"], config["protected_steps"]) == (2, None)
    loaded = WanTransformer3DModel.from_pretrained(saved[1])
    diffusers_hook.enable(loaded, progress=False, protected_steps="none")
    loaded.save_pretrained(tmp_path / "again")
    config = stored(tmp_path / "again")
    assert config["format_version"] == 1
    assert not {"rotation", "protected_steps"} & config.keys()
    again = WanTransformer3DModel.from_pretrained(tmp_path / "again")
    assert attached(again).config.protected_steps == "none"
    diffusers_hook.enable(again, progress=False, activation_format="fp8")
    diffusers_hook.enable(again, progress=False, activation_format="dialect")
    assert attached(again).config.protected_steps == "none"


def test_sharded_files_come_back_too(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_same(model, WanTransformer3DModel.from_pretrained(tmp_path / "shards"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantizing_while_loading_gives_the_bytes_of_enable(plain, dtype):
    online = WanTransformer3DModel.from_pretrained(
        plain, quantization_config=SemanticDialectConfig(seda=True), torch_dtype=dtype
    )
    model = WanTransformer3DModel.from_pretrained(plain, torch_dtype=dtype)
    diffusers_hook.enable(model, progress=False, seda=True)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DialectLinear)}
    assert len(layers) == 20
    for name, layer in layers.items():
        assert_same(layer, online.get_submodule(name))
    assert run(online, dtype=dtype).isfinite().all()


def test_loading_in_another_dtype_changes_no_code(saved):
    model, folder = saved
    loaded = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    integers = {k: v for k, v in model.state_dict().items() if not v.is_floating_point()}
    assert len(integers) == 3 * 20 + 2
    for name, tensor in integers.items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert run(loaded, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_whole_pipeline_is_saved_and_loaded(tmp_path):
    pipe = wan_pipeline()
    pipe.save_pretrained(tmp_path / "plain")
    pipe.enable_semantic_dialect(progress=False, seda=True)
    pipe.save_pretrained(tmp_path / "packed")
    video = generate(pipe)
    packed = WanPipeline.from_pretrained(tmp_path / "packed")
    packed.set_progress_bar_config(disable=True)
    assert_same(pipe.transformer, packed.transformer)
    assert torch.equal(generate(packed), video)
    mapping = PipelineQuantizationConfig(
        quant_mapping={"transformer": SemanticDialectConfig(seda=True)}
    )
    online = WanPipeline.from_pretrained(tmp_path / "plain", quantization_config=mapping)
    online.set_progress_bar_config(disable=True)
    assert_same(pipe.transformer, online.transformer)
    assert torch.equal(generate(online), video)


def test_a_pipeline_from_files_finds_its_originals_there(tmp_path):
    wan_pipeline().save_pretrained(tmp_path)
    pipe = WanPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    before = generate(pipe)
    pipe.enable_semantic_dialect(progress=False, seda=True)
    assert pipe.semantic_dialect_summary().transformers[0].originals == "disk"
    pipe.disable_semantic_dialect()
    assert torch.equal(generate(pipe), before)
    alone = WanTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer")
    diffusers_hook.enable(alone, progress=False, seda=True)
    assert diffusers_hook.summary(alone).transformers[0].originals == "disk"


def test_a_model_from_the_hubs_cache_finds_its_originals_there(tmp_path, monkeypatch):
    """The cache's own layout: refs/main names a commit, snapshots/<commit> holds its files."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--someone--tiny-video"
    wan().save_pretrained(cached / "snapshots" / commit / "transformer")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = WanTransformer3DModel.from_pretrained(
        "someone/tiny-video", subfolder="transformer", cache_dir=tmp_path, local_files_only=True
    )
    before = run(model)
    diffusers_hook.enable(model, progress=False, seda=True)
    assert diffusers_hook.summary(model).transformers[0].originals == "disk"
    diffusers_hook.disable(model)
    assert torch.equal(run(model), before)


def test_disable_takes_the_format_out_of_the_configuration(plain, tmp_path):
    model = WanTransformer3DModel.from_pretrained(plain)
    before = dict(model.config)
    diffusers_hook.enable(model, progress=False, seda=True)
    assert model.config["quantization_config"].quant_method == "semantic_dialect"
    diffusers_hook.disable(model)
    assert dict(model.config) == before
    model.save_pretrained(tmp_path)
    assert_same(WanTransformer3DModel.from_pretrained(tmp_path), wan())


def test_dequantize_gives_a_plain_model(saved, tmp_path):
    model, folder = saved
    loaded = WanTransformer3DModel.from_pretrained(folder)
    loaded.dequantize()
    assert not any(isinstance(module, DialectLinear) for module in loaded.modules())
    decoded = model.blocks[0].attn1.to_q.weight
    assert torch.equal(loaded.blocks[0].attn1.to_q.weight, decoded)
    loaded.save_pretrained(tmp_path / "again")
    plain = WanTransformer3DModel.from_pretrained(tmp_path / "again")
    assert torch.equal(plain.blocks[0].attn1.to_q.weight, decoded)


def test_a_loaded_model_cannot_be_disabled(saved):
    loaded = WanTransformer3DModel.from_pretrained(saved[1])
    with pytest.raises(RuntimeError, match="was loaded quantized; load the 16-bit checkpoint"):
        diffusers_hook.disable(loaded)


def test_enabling_a_loaded_model_without_options_changes_nothing(saved):
    loaded = WanTransformer3DModel.from_pretrained(saved[1])
    before, hook = run(loaded), attached(loaded)
    assert diffusers_hook.enable(loaded) is loaded
    assert attached(loaded) is hook
    assert torch.equal(run(loaded), before)
    with pytest.raises(diffusers_hook.LayoutError, match="was loaded quantized with layout 'wan'"):
        diffusers_hook.enable(loaded, layout="ltx")


@pytest.mark.parametrize("format", ["fp8", "none"])
def test_an_activation_format_switches_saved_salient_tokens_and_groups_off(saved, format):
    loaded, enabled = WanTransformer3DModel.from_pretrained(saved[1]), wan()
    diffusers_hook.enable(loaded, activation_format=format)
    diffusers_hook.enable(enabled, progress=False, activation_format=format)
    assert torch.equal(run(loaded), run(enabled))
    assert diffusers_hook.summary(loaded).transformers[0].salient_share == 0


def test_a_loaded_model_takes_other_options_for_its_activations(saved, tmp_path):
    """As if the model had been enabled with them; what is in the weights stays."""
    _, folder = saved
    loaded = WanTransformer3DModel.from_pretrained(folder)
    codes = loaded.blocks[0].attn1.to_q.weight_packed
    for options in (
        {"selection": "random", "seed": 3, "salient_fraction": 0.5, "seda": False},
        {"activation_format": "none", "salient_fraction": 0.0, "seda": False},
        {"seda": True, "seda_refresh": 1, "salient_refresh": 1},
    ):
        enabled = wan()
        diffusers_hook.enable(enabled, progress=False, **options)
        loaded = WanTransformer3DModel.from_pretrained(folder)
        config = SemanticDialectConfig(salient_fraction=0.1, seda=False).replaced(**options)
        assert diffusers_hook.enable(loaded, config) is loaded
        assert torch.equal(run(loaded), run(enabled))
    loaded.save_pretrained(tmp_path / "again")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "again")
    assert attached(again).config.seda_refresh == 1
    assert torch.equal(run(again), run(loaded))
    assert torch.equal(again.blocks[0].attn1.to_q.weight_packed, codes)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"block_size": 16},
            ConfigError,
            "block_size: 16 needs other weights than those loaded",
        ),
        ({"book": "dialect_fp4", "seda": False}, ConfigError, "book: 'dialect_fp4' needs other"),
        ({"modulation": "16bit"}, ConfigError, "modulation: '16bit' needs other weights"),
        ({"ignore": ["re:b"]}, ConfigError, "ignore: ('re:b',) needs other weights"),
        ({"keep_original": "host"}, ConfigError, "keep_original: 'host' needs other weights"),
        (
            {"activation_format": "none", "seda": True},
            ConfigError,
            "seda: True has no effect with activ",
        ),
        ({"salient_fraction": 2}, ConfigError, "salient_fraction: 2 cannot be used"),
        ({"layout": "ltx", "seed": 1}, diffusers_hook.LayoutError, "quantized with layout 'wan'"),
    ],
)
def test_what_needs_other_weights_is_refused_of_a_loaded_model(saved, options, error, sentence):
    loaded = WanTransformer3DModel.from_pretrained(saved[1])
    before, hook = run(loaded), attached(loaded)
    with pytest.raises(error) as caught:
        diffusers_hook.enable(loaded, **options)
    assert sentence in str(caught.value)
    assert attached(loaded) is hook
    assert torch.equal(run(loaded), before)


def test_a_single_file_is_quantized_while_loading(plain, saved, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(wan().state_dict(), file)
    options = {"config": str(plain), "quantization_config": SemanticDialectConfig()}
    loaded = WanTransformer3DModel.from_single_file(str(file), **options)
    model = wan()
    diffusers_hook.enable(model, progress=False)
    assert_same(model, loaded)
    assert torch.equal(run(model), run(loaded))
    with pytest.raises(
        ValueError, match="the file holds a quantized model, whose tensors from_sin"
    ):
        WanTransformer3DModel.from_single_file(str(saved[1] / WEIGHTS), **options)


def test_a_device_map_that_offloads_is_refused(saved, tmp_path):
    options = {"offload_folder": tmp_path / "offload"}
    places = {"": "cpu", "blocks.1": "disk"}
    with pytest.raises(
        ValueError, match=r"device_map: offloads layers \(cpu, disk\), which cannot"
    ):
        WanTransformer3DModel.from_pretrained(saved[1], device_map=places, **options)


def test_a_file_with_the_old_names_of_options_is_loaded_and_means_the_same(tmp_path, recwarn):
    model = wan()
    ignored = [r"re:blocks\.0\.attn1\.to_[qk]$", "blocks.1.ffn.net.2"]
    diffusers_hook.enable(model, progress=False, activation_format="fp8", ignore=ignored)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    saved = config["quantization_config"]
    assert saved.pop("activation_format") == "fp8"
    assert saved.pop("ignore") == ignored
    saved |= {
        "activation": "fp8",
        "skip": [r"blocks\.0\.attn1\.to_[qk]", r"blocks\.1\.ffn\.net\.2"],
    }
    path.write_text(json.dumps(config))
    recwarn.clear()
    loaded = WanTransformer3DModel.from_pretrained(tmp_path)
    assert not [found for found in recwarn if "diffusers_hook" in found.filename]
    assert_same(model, loaded)
    assert torch.equal(run(model), run(loaded))


def test_without_our_import_diffusers_refuses_the_model(saved):
    code = f"import diffusers\ndiffusers.WanTransformer3DModel.from_pretrained({str(saved[1])!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "Unknown quantization type" in done.stderr


def edited(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


NAME = "blocks.1.ffn.net.2"
TIME = "condition_embedder.time_proj"
EXPONENT = f"{NAME}.weight_row_exponent: is stored as"


def nan_row(tensors):
    tensors[f"{NAME}.weight_row_exponent"][5] = -128


def missing(tensors):
    del tensors[f"{NAME}.weight_meta"]


def wrong_shape(tensors):
    tensors[f"{NAME}.weight_meta"] = tensors[f"{NAME}.weight_meta"][:, :-1].contiguous()


def nan_fp8(tensors):
    tensors[f"{TIME}.weight_fp8"][2, 3] = 0x7F


def scale(value):
    def edit(tensors):
        tensors[f"{TIME}.weight_scale"].view(torch.float32)[4] = value

    return edit


def nan_bias(name):
    def edit(tensors):
        tensors[f"{name}.bias"][1] = torch.nan

    return edit


def no_norm(tensors):
    del tensors["blocks.1.norm2.weight"]


def row_exponent(change):
    def edit(tensors):
        tensors[f"{NAME}.weight_row_exponent"] = change(tensors[f"{NAME}.weight_row_exponent"])

    return edit


def wide_codes(tensors):
    tensors[f"{NAME}.weight_packed"] = tensors[f"{NAME}.weight_packed"].to(torch.int16)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (nan_row, f"{NAME}.weight_row_exponent: -128 at [5]; allowed are -120..125"),
        (missing, f"{NAME}.weight_meta: is missing in the checkpoint"),
        (wrong_shape, f"{NAME}.weight_meta expected shape"),
        (nan_fp8, f"{TIME}.weight_fp8: nan at [2, 3]"),
        (scale(3.4e38), f"{TIME}.weight_scale: 3.3999999521443642e+38 at [4]; allowed are numbers"),
        (scale(-1.0), f"{TIME}.weight_scale: -1.0 at [4]; allowed are numbers above 0 and up to"),
        (scale(torch.nan), f"{TIME}.weight_scale: nan at [4]; allowed are numbers above 0"),
        (nan_bias(TIME), f"{TIME}.bias: nan at [1]; the file is damaged"),
        (nan_bias(NAME), f"{NAME}.bias: nan at [1]; the file is damaged"),
        (no_norm, "blocks.1.norm2.weight: is missing in the checkpoint"),
        (row_exponent(lambda r: r + 0.5), f"{EXPONENT} torch.float32, but must be torch.int8"),
        (row_exponent(lambda r: r.int() + 256), f"{EXPONENT} torch.int32, but must be torch.int8"),
        (wide_codes, f"{NAME}.weight_packed: is stored as torch.int16, but must be torch.uint8"),
    ],
)
def test_tampered_tensors_are_refused_by_name(saved, edit, sentence):
    edited(saved[1], edit)
    with pytest.raises(ValueError, match=r"\.") as caught:
        WanTransformer3DModel.from_pretrained(saved[1])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format_version": 3}, "format_version: 3 cannot be used: this release reads versions up"),
        (
            {"rotation": "hadamard_32", "format_version": 1},
            "rotation: 'hadamard_32' needs format_version 2, not 1",
        ),
        ({"format_version": 1}, "protected_steps: None needs format_version 2, not 1; save the "),
        ({"blok_size": 32}, "blok_size: is not an option of SemanticDialectConfig; did you mean"),
        ({"block_size": 24}, "block_size: 24 cannot be used"),
    ],
)
def test_a_configuration_of_another_release_is_refused(saved, change, sentence):
    path = saved[1] / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        WanTransformer3DModel.from_pretrained(saved[1])
    assert str(caught.value).startswith(sentence)
