"""The published Qwen3-VL checkpoints: every name and shape, sharded folders, and what is refused.

No file of the hub is read. The shapes are those of the published config.json files
(plan.PUBLISHED); the totals were compared with counts that others took from the published tensors:
2.128 B with 407.0 M of vision (2B), 8.767 B with 576.4 M (8B).
"""
import json
import shutil
from importlib.util import find_spec

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cue_recovery
import model as qwen
from scale import checkpoint, checks
from scale import plan

INSTRUCT = [f"Qwen/Qwen3-VL-{size}-Instruct" for size in ("2B", "8B", "32B")]


def layout(config: dict) -> dict[str, tuple]:
    """Name -> shape of every tensor in the checkpoint's files, written out by hand."""
    text, vision, out = config["text_config"], config["vision_config"], {}
    D, F, V, d = (text[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    A, K = text["num_attention_heads"] * d, text["num_key_value_heads"] * d
    out["model.language_model.embed_tokens.weight"] = (V, D)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = (V, D)
    out["model.language_model.norm.weight"] = (D,)
    layer = {"self_attn.q_proj": (A, D), "self_attn.k_proj": (K, D), "self_attn.v_proj": (K, D),
             "self_attn.o_proj": (D, A), "self_attn.q_norm": (d,), "self_attn.k_norm": (d,),
             "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
             "input_layernorm": (D,), "post_attention_layernorm": (D,)}
    for n in range(text["num_hidden_layers"]):
        out |= {f"model.language_model.layers.{n}.{k}.weight": s for k, s in layer.items()}
    D, F, P, M = (vision[k] for k in ("hidden_size", "intermediate_size", "patch_size",
                                      "spatial_merge_size"))
    out["model.visual.pos_embed.weight"] = (vision["num_position_embeddings"], D)
    biased = {"patch_embed.proj": (D, vision["in_channels"], vision["temporal_patch_size"], P, P)}
    block = {"norm1": (D,), "norm2": (D,), "attn.qkv": (3 * D, D), "attn.proj": (D, D),
             "mlp.linear_fc1": (F, D), "mlp.linear_fc2": (D, F)}
    for n in range(vision["depth"]):
        biased |= {f"blocks.{n}.{k}": s for k, s in block.items()}
    # four patches make one visual token; the last merger normalises them before, DeepStack's after
    mergers = {"merger": (D,)} | {f"deepstack_merger_list.{n}": (D * M**2,)
                                  for n in range(len(vision["deepstack_visual_indexes"]))}
    for name, norm in mergers.items():
        biased |= {f"{name}.norm": norm, f"{name}.linear_fc1": (D * M**2, D * M**2),
                   f"{name}.linear_fc2": (vision["out_hidden_size"], D * M**2)}
    for name, shape in biased.items():
        out |= {f"model.visual.{name}.weight": shape, f"model.visual.{name}.bias": shape[:1]}
    return out


def class_config(config: dict):
    return transformers.Qwen3VLConfig(**{k: v for k, v in config.items() if k != "model_type"})


def on_meta(config: dict):
    with torch.device("meta"):
        return transformers.Qwen3VLForConditionalGeneration(class_config(config))


# ---------------------------------------------------------------------------- published shapes

@pytest.mark.parametrize("name, total, vision", [
    (INSTRUCT[0], 2_127_532_032, 406_957_056), (INSTRUCT[1], 8_767_123_696, 576_388_336),
    (INSTRUCT[2], 33_357_390_064, 595_266_800)])
def test_published_layout_is_that_of_the_class(name, total, vision):
    config = plan.published(name)
    expected, model = layout(config), on_meta(config)
    found = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == (name == INSTRUCT[0])
    if tied:
        assert found.pop("lm_head.weight") == expected["model.language_model.embed_tokens.weight"]
    assert found == expected
    sizes = {k: torch.Size(shape).numel() for k, shape in expected.items()}
    assert sum(sizes.values()) == total == sum(p.numel() for p in model.parameters())
    assert sum(n for k, n in sizes.items() if k.startswith("model.visual.")) == vision
    rope = model.config.text_config.rope_parameters
    assert (rope["mrope_section"], rope["rope_theta"]) == ([24, 20, 20], 5e6)


@pytest.mark.parametrize("name, blocks, paper", [
    (INSTRUCT[0], 6, 100.7e6), (INSTRUCT[1], 8, 536.9e6)])
def test_module_has_the_size_of_the_papers(name, blocks, paper, monkeypatch):
    """4 H^2 a block. At 8B the paper counts a block behind the last layer, which no token can read:
    67 M, left out here. The gains of our norms, 2 H a block, are counted apart."""
    model = on_meta(plan.published(name))
    monkeypatch.setattr(torch.nn.init, "normal_", lambda *_, **__: None)    # only the sizes matter
    with torch.device("meta"):
        cue = cue_recovery.attach(model)
    H, depth = cue.settings()["hidden"], model.config.text_config.num_hidden_layers
    assert cue.settings()["layers"] == [n for n in range(0, depth, 5) if n != depth - 1]
    behind_the_last = (depth - 1) % 5 == 0
    assert len(cue.blocks) + behind_the_last == blocks
    matrices = sum(p.numel() for p in cue.parameters() if p.dim() == 2)
    block = 4 * H**2
    assert matrices + behind_the_last * block == blocks * block == pytest.approx(paper, rel=1e-3)
    assert sum(p.numel() for p in cue.parameters()) == matrices + len(cue.blocks) * 2 * H


# ---------------------------------------------------------------------------- sharded folders

def narrow(name: str) -> dict:
    """The published layers in their number, their width and vocabulary reduced to the tiny's."""
    config = plan.published(name)
    tiny = json.loads((qwen.TINY / "config.json").read_text())
    config |= {k: tiny[k] for k in ("image_token_id", "video_token_id")}
    config["text_config"] |= {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 48, "vocab_size": tiny["text_config"]["vocab_size"],
        "rope_scaling": {**config["text_config"]["rope_scaling"], "mrope_section": [2, 1, 1]}}
    config["vision_config"] |= {
        "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
        "patch_size": 8, "num_position_embeddings": 64}
    return config


def in_bf16(config: dict):
    """Random weights. Not by .to(torch.bfloat16), which would also round the rotary frequencies."""
    return transformers.Qwen3VLForConditionalGeneration._from_config(
        class_config(config), dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def sharded(loaded, tmp_path_factory):
    """Folder of a narrow 8B in bf16, untied, with the module, in several files with an index."""
    model = in_bf16(narrow(INSTRUCT[1]))
    cue_recovery.attach(model)
    folder = tmp_path_factory.mktemp("layout") / "sharded"
    checkpoint.save_model(model, loaded[1], folder, max_shard_size="300KB")
    return folder


def on_disk(folder):
    """(name -> shape, dtypes) over all weight files, and the index must say which file has what."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shapes, kinds = {}, set()
    for path in sorted(folder.glob("model-*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                assert index[key] == path.name
                shapes[key] = tuple(file.get_slice(key).get_shape())
                kinds.add(file.get_slice(key).get_dtype())
    assert index.keys() == shapes.keys() and len(set(index.values())) > 2
    return shapes, kinds


@pytest.mark.parametrize("name", INSTRUCT[:2])
def test_sharded_bf16_round_trip(loaded, ragged, tmp_path, name):
    """2B ties its head to the embedding, 8B does not; both come back bit for bit, from files whose
    names and shapes are those of the published layout."""
    config = narrow(name)
    model = in_bf16(config)
    cue = cue_recovery.attach(model)
    for block in cue.blocks.values():
        torch.nn.init.normal_(block.output.weight, std=0.1)
    checkpoint.save_model(model, loaded[1], tmp_path / "out", max_shard_size="300KB")
    assert on_disk(tmp_path / "out") == (layout(config), {"BF16"})
    again, processor = qwen.load(tmp_path / "out", dtype="bfloat16", device="cpu")
    tied = again.lm_head.weight is again.get_input_embeddings().weight
    assert tied == config["tie_word_embeddings"]
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys() and any(k.startswith("cue_recovery.") for k in found)
    for key in expected:
        assert found[key].dtype == torch.bfloat16 and torch.equal(found[key], expected[key]), key
    with torch.no_grad():
        one, two = (m(**processor.batch(ragged)).logits for m in (model, again))
    assert torch.equal(one, two)


def edit(folder, change):
    """Apply `change` to the dict of tensors in the second weight file."""
    path = sorted(folder.glob("model-*.safetensors"))[1]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def drop(folder):
    edit(folder, lambda tensors: [tensors.pop(k) for k in sorted(tensors)[:7]])


def add(folder):
    edit(folder, lambda tensors: tensors.update({"model.visual.extra.weight": torch.ones(2)}))


def shorten(folder):
    edit(folder, lambda tensors: tensors.update({k: v[:-1].clone() for k, v in tensors.items()
                                                 if k.endswith("layers.9.mlp.up_proj.weight")}))


def remove_file(folder):
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def truncate_file(folder):
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def remove_all(folder):
    for path in folder.glob("model*"):
        path.unlink()


@pytest.mark.parametrize("damage, kind, message", [
    (drop, ValueError, r"7 weights are missing: \['model\.[^]]*'(, 'model\.[^]]*'){4}\]$"),
    (add, ValueError, r"1 weights are unknown to this class: \['model.visual.extra.weight'\]"),
    (shorten, ValueError, r"1 weights are of another shape: \['model.language_model.layers.9.mlp."
                          r"up_proj.weight \(47, 32\), expected \(48, 32\)'\]"),
    (remove_file, FileNotFoundError, r"1 of \d+ weight files are missing: \['model-00002-of-"),
    (truncate_file, ValueError, "damaged weights, perhaps an unfinished download"),
    (remove_all, FileNotFoundError, r"1 of 1 weight files are missing: \['model.safetensors'\]")])
def test_a_wrong_or_partial_checkpoint_is_refused(sharded, tmp_path, damage, kind, message):
    """transformers fills missing weights, and those of another shape, with random numbers and a
    warning; it drops what it does not know. Such a model trains, and learns from nonsense."""
    folder = tmp_path / "broken"
    shutil.copytree(sharded, folder)
    damage(folder)
    with pytest.raises(kind, match=f"broken: {message}"):
        qwen.load(folder, device="cpu")


def test_a_pickle_is_never_read(sharded, tmp_path):
    """Weights come as safetensors only: a pickle can run code when it is read."""
    folder = tmp_path / "pickled"
    shutil.copytree(sharded, folder)
    remove_all(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        qwen.load(folder, device="cpu")


# ---------------------------------------------------------------------------- other layouts

def tiny_folder(folder, sizes, nested=False):
    """The tiny checkpoint whose picture settings name sizes so; nested: as transformers 5 saves."""
    shutil.copytree(qwen.TINY, folder)
    path = folder / "preprocessor_config.json"
    settings = {k: v for k, v in json.loads(path.read_text()).items() if k != "size"} | sizes
    path.write_text(json.dumps(settings))
    if nested:
        path.unlink()
        (folder / "processor_config.json").write_text(json.dumps(
            {"processor_class": "Qwen3VLProcessor", "image_processor": settings,
             "video_processor": {"size": {"shortest_edge": 1, "longest_edge": 2}}}))
    return folder


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("sizes, low, high", [
    ({"size": {"shortest_edge": 1024, "longest_edge": 65536}}, 1024, 65536),
    ({"min_pixels": 1024, "max_pixels": 65536}, 1024, 65536),
    ({"min_pixels": None, "max_pixels": None, "size": {"shortest_edge": 9, "longest_edge": 99}},
     9, 99),
    ({"size": {"min_pixels": 1024, "max_pixels": 65536}}, 1024, 65536),
    ({"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 1024, "max_pixels": 65536},
     1024, 65536),
    ({"size": {"height": 256, "width": 128}}, 3136, 256 * 128),
    ({"size": {"height": 16, "width": 16}}, 256, 256),
    ({"size": None}, 3136, 1003520), ({}, 3136, 1003520)])
def test_sizes_in_every_layout_load_and_are_saved(tiny, tmp_path, nested, sizes, low, high):
    """Folders saved by transformers 5 were "not a Qwen3-VL folder", other sizes a KeyError. What
    save() writes says the same to us and, where the class can read it at all, to transformers."""
    processor = qwen.Processor(tiny_folder(tmp_path / "start", sizes, nested))
    assert (processor.min_pixels, processor.max_pixels) == (low, high)
    kind = getattr(transformers, "Qwen2VLImageProcessorPil", None)
    if kind and not {"height", "min_pixels"} & (sizes.get("size") or {}).keys():
        size = kind.from_pretrained(tmp_path / "start").size
        assert (size["shortest_edge"], size["longest_edge"]) == (low, high)
    own = qwen.Processor(processor.folder, max_pixels=high + 5)
    checkpoint.save_model(tiny[0], own, tmp_path / "out")
    again = qwen.load(tmp_path / "out", device="cpu")[1]
    assert (again.min_pixels, again.max_pixels) == (low, high + 5)
    assert (tmp_path / "out" / "preprocessor_config.json").exists() != nested
    if kind:
        size = kind.from_pretrained(tmp_path / "out").size
        assert (size["shortest_edge"], size["longest_edge"]) == (low, high + 5)


def test_an_adapter_alone_is_refused_by_name(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(
        {"base_model_name_or_path": "Qwen/Qwen3-VL-2B-Instruct", "peft_type": "LORA"}))
    with pytest.raises(ValueError, match="lora holds an adapter only.*merge it into Qwen/Qwen3-VL"):
        checks.small_files(tmp_path / "lora")


def quantised(folder, settings, where=None):
    shutil.copytree(qwen.TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    (config[where] if where else config)["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()      # nothing of them is asked for
    return folder


@pytest.mark.parametrize("where", [None, "text_config"])
@pytest.mark.parametrize("settings, missing, reason", [
    ({"quant_method": "awq", "bits": 4}, "gptqmodel", "awq.* cannot be read here: .*gptqmodel"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", "pip install"),
    ({"quant_method": "fp8"}, "accelerate", "fp8.* cannot be read here: .*accelerate"),
    ({"quant_method": "none-of-them"}, "", "none-of-them.* cannot be read here: Unknown")])
def test_quantised_weights_are_read_or_refused_in_one_line(tmp_path, settings, missing, reason,
                                                           where):
    """The library was missed only when all of the weights had been fetched."""
    if missing and find_spec(missing):
        pytest.skip(f"{missing} is installed here")
    folder = quantised(tmp_path / "small", settings, where)
    with pytest.raises(ValueError, match=f"small: the weights are quantised .*{reason}") as error:
        checks.small_files(folder)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------- mixture of experts

@pytest.fixture(scope="module")
def experts(loaded, tmp_path_factory):
    """Folder of a random mixture of experts, its other shapes those of the tiny checkpoint."""
    config = json.loads((qwen.TINY / "config.json").read_text())
    text = {**config["text_config"], "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "model_type": "qwen3_vl_moe_text", "tie_word_embeddings": False}
    vision = {k: v for k, v in config["vision_config"].items() if k != "model_type"}
    ids = {k: v for k, v in config.items() if k.endswith("token_id")}
    torch.manual_seed(0)
    model = transformers.Qwen3VLMoeForConditionalGeneration._from_config(
        transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids,
                                      tie_word_embeddings=False), dtype=torch.float32).eval()
    folder = tmp_path_factory.mktemp("experts") / "moe"
    checkpoint.save_model(model, loaded[1], folder)
    return folder


def test_a_mixture_of_experts_round_trip(experts, ragged, tmp_path):
    """model_type "qwen3_vl_moe", as many teachers have it, was refused after the whole download.
    It loads, takes the module, and comes back from its files bit for bit."""
    model, processor = qwen.load(experts, device="cpu")
    assert isinstance(model, transformers.Qwen3VLMoeForConditionalGeneration)
    with torch.no_grad():
        base = model(**processor.batch(ragged)).logits
        blocks = cue_recovery.attach(model, 2).blocks.values()
        assert torch.equal(model(**processor.batch(ragged)).logits, base)      # W_O = 0
        for block in blocks:
            torch.nn.init.normal_(block.output.weight, std=0.1)
        expected = model(**processor.batch(ragged)).logits
        assert torch.isfinite(expected).all() and not torch.equal(expected, base)
        checkpoint.save_model(model, processor, tmp_path / "out")
        again, _ = qwen.load(tmp_path / "out", device="cpu")
        assert torch.equal(again(**processor.batch(ragged)).logits, expected)
    stock = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(stock(**processor.batch(ragged)).logits, base)
    shapes, _ = qwen.load(tmp_path / "out", device="meta", cue=False)
    assert {k: v.shape for k, v in shapes.state_dict().items()} == {
        k: v.shape for k, v in stock.state_dict().items()}


def test_a_mixture_of_experts_lacks_no_weight_silently(experts, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(experts, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.language_model.layers.1.mlp.experts.gate_up_proj")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="broken: 1 weights are missing.*layers.1.mlp.experts"):
        qwen.load(folder, device="cpu")
