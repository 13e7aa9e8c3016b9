"""The published Qwen3-VL checkpoints: every name and shape, sharded folders, and what is refused.

No file of the hub is read. The shapes are those of the published config.json files
(plan.PUBLISHED); the totals were compared with counts that others took from the published tensors:
2.128 B with 407.0 M of vision (2B), 8.767 B with 576.4 M (8B).
"""
import json
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cue_recovery
import model as qwen
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
    qwen.save(model, loaded[1], folder, max_shard_size="300KB")
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
    qwen.save(model, loaded[1], tmp_path / "out", max_shard_size="300KB")
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
