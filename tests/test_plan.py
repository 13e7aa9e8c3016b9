"""plan.py: its arithmetic against real tensors at small size, and the command line.

Peaks of whole steps are compared in tests/speed/memory.py, by hand: they take minutes.
"""
import dataclasses
import inspect
import json
import re
import shlex
import weakref

import pytest
import torch
import transformers

import cue_recovery
import distill
import evaluate
import model as qwen
from scale import decoder, lora, plan
import rollout
from conftest import ROOT
from loss import ROWS, distill_loss
from scale.optimizer import Optimizer
from test_layout import layout, narrow

TINY = json.loads((qwen.TINY / "config.json").read_text())
BYTES = {torch.float32: 4, torch.bfloat16: 2}


def size_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


DENSE = [name for name in plan.PUBLISHED if "-A" not in name]


@pytest.mark.parametrize("config", [*map(plan.published, DENSE), TINY, narrow("Qwen/Qwen3-VL-8B")],
                         ids=[*DENSE, "tiny", "narrow"])
def test_counts_are_those_of_the_layout(config):
    """test_layout.py compares that layout with the class."""
    sizes = {name: torch.Size(shape).numel() for name, shape in layout(config).items()}
    counts = plan.count(plan.dimensions(config))
    assert counts.total == sum(sizes.values())
    assert counts.vision == sum(n for name, n in sizes.items() if name.startswith("model.visual."))
    assert counts.layer == sum(n for name, n in sizes.items() if ".layers.1." in name)


def of_class(config: dict, **how):
    """A model of random weights from a config.json, dense or a mixture of experts."""
    kind = "Qwen3VLMoe" if config["model_type"] == "qwen3_vl_moe" else "Qwen3VL"
    made = getattr(transformers, kind + "Config")(
        **{k: v for k, v in config.items() if k != "model_type"})
    return getattr(transformers, kind + "ForConditionalGeneration")._from_config(made, **how)


@pytest.mark.parametrize("name, changes, total", [
    ("Qwen/Qwen3-VL-30B-A3B-Instruct", {}, 31_070_754_032),
    ("Qwen/Qwen3-VL-235B-A22B-Thinking", {}, 235_670_022_896),
    ("Qwen/Qwen3-VL-30B-A3B", {"mlp_only_layers": [1, 4], "decoder_sparse_step": 2}, None),
    ("Qwen/Qwen3-VL-30B-A3B", {"num_local_experts": 16, "num_experts": None}, None)])
def test_experts_are_counted_as_the_class_has_them(name, changes, total):
    """A mixture of experts was counted as if it were dense. Some layers may be dense all the same;
    and transformers 5 saves the number of experts under another name."""
    config = plan.published(name)
    config["text_config"] |= changes
    config["text_config"] = {k: v for k, v in config["text_config"].items() if v is not None}
    with torch.device("meta"):
        model = of_class(config)
    counts = plan.count(plan.dimensions(config))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert counts.total == sum(sizes.values()) == (total or counts.total)
    assert counts.language == sum(n for k, n in sizes.items() if not k.startswith("model.visual."))
    assert counts.layer == max(sum(n for k, n in sizes.items() if f".layers.{layer}." in k)
                               for layer in range(4))


def run_of(**changes) -> plan.Run:
    small = dict(batch_size=4, sample_batch=4, max_prompt_tokens=90, max_new_tokens=10,
                 micro_batch_tokens=200, every=2, device="cpu", dtype="float32")
    return plan.Run(**{**small, **changes})


@pytest.mark.parametrize("train", ["all", "language", "cue"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_gradients_and_optimizer_are_those_of_a_run(tiny, train, dtype):
    """Byte for byte, after a real update of the tiny model: only what is trained has a gradient,
    moments and (in bf16) a master."""
    student = tiny[0].to(dtype)
    cue_recovery.attach(student, every=2)
    weights = distill.choose_weights(student, train)
    made = plan.plan(run_of(train=train, dtype=str(dtype)[6:]), TINY)
    assert made.parts["student's weights"] == size_of(student.parameters())
    assert made.parameters["module"] == sum(p.numel() for p in student.cue_recovery.parameters())
    assert made.parameters["trained"] == sum(p.numel() for _, p in weights)
    for _, p in weights:
        p.grad = torch.zeros_like(p)
    assert made.parts["gradients"] == size_of(
        p.grad for p in student.parameters() if p.grad is not None)
    optimizer = Optimizer(weights, lr=0, cue_lr=0, warmup=1, steps=1, final=1, clip=1)
    optimizer.step(0)
    owned = [t for name, t in optimizer.tensors().items()
             if t.dim() and not (dtype == torch.float32 and name.startswith("weight/"))]
    assert made.parts["optimizer"] == size_of(owned)
    assert made.parameters["teacher"] == (0 if train == "cue" else sum(
        p.numel() for n, p in student.named_parameters() if not n.startswith("cue_recovery.")))


def test_cache_is_that_of_the_sampler(loaded, records):
    """Two samples of each of two prompts: the bytes of every layer's keys and values, and room."""
    model, processor = loaded
    batch = processor.batch([processor.prompt(records[0])] * 2)
    sampler = decoder.FastDecoder(model)
    with torch.no_grad():
        sampler.read(batch, 2)
    made = plan.plan(run_of(max_prompt_tokens=batch["input_ids"].shape[1], samples_per_prompt=2,
                            batch_size=2), TINY)
    assert made.parts["key/value cache"] == size_of(sampler.cache.buffers)
    assert (plan.ROOM, plan.CHUNK, plan.ROWS) == (decoder.ROOM, inspect.signature(
        distill_loss).parameters["chunk"].default, ROWS)
    assert (plan.JOIN, plan.GROUP) == (rollout.JOIN, evaluate.GROUP)


def shape() -> dict:
    """Large enough that the layers outweigh what is made once, small enough to run at once."""
    config = narrow("Qwen/Qwen3-VL-2B")
    config["text_config"] |= {
        "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 160,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2],
                         "rope_type": "default"}}
    config["vision_config"] |= {
        "hidden_size": 48, "intermediate_size": 128, "num_heads": 4, "depth": 6,
        "out_hidden_size": 64, "deepstack_visual_indexes": [1, 2, 3]}
    return config


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 80,
           "decoder_sparse_step": 1, "mlp_only_layers": []}


def kept_for_backward(dtype, train, attention, checkpointing, experts=False) -> tuple[int, int]:
    """(bytes that autograd really keeps of a forward pass, bytes that the plan says)."""
    torch.manual_seed(0)
    config, rows, prompt, answer, patches = shape(), 3, 80, 20, 256
    if experts:
        config["model_type"] = "qwen3_vl_moe"
        config["text_config"] |= EXPERTS
    model = of_class(config, dtype=dtype, attn_implementation=attention).train()
    cue_recovery.attach(model, every=2)
    if train == "lora":
        lora.attach(model, rank=16)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(("lora.", "cue_recovery.")))
    else:
        distill.choose_weights(model, train)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    image, processor = config["image_token_id"], qwen.Processor(qwen.TINY)
    prompts = [qwen.Prompt([5] * (prompt - 64 - n) + [image] * 64, torch.randn(patches, 384),
                           [(1, 16, 16)]) for n in range(rows)]            # n: so that it is padded
    both = [dataclasses.replace(p, ids=p.ids + [7] * answer) for p in prompts]
    batch = processor.batch(both, side="right")
    del batch["attention_mask"], batch["mm_token_type_ids"]
    end = torch.tensor([len(p.ids) for p in prompts])
    seen = {p.untyped_storage().data_ptr(): None for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen.setdefault(storage.data_ptr(), (storage.nbytes(), weakref.ref(tensor)))
        return tensor

    watched = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with watched, model.cue_recovery.prompt(end):
        hidden = model.model(**batch, use_cache=False).last_hidden_state
    found = sum(item[0] for item in seen.values() if item and item[1]() is not None)
    assert hidden.requires_grad
    m = plan.dimensions(config)
    run = run_of(train=train, attention=attention, gradient_checkpointing=checkpointing)
    planned, _ = plan.learning(m, BYTES[dtype], run, rows * (prompt + answer), rows, patches,
                               prompt + answer)
    return found, planned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train, attention, checkpointing, within", [
    ("all", "sdpa", False, 0.03), ("all", "eager", False, 0.03), ("language", "sdpa", False, 0.03),
    ("cue", "sdpa", False, 0.05), ("lora", "sdpa", False, 0.03), ("all", "sdpa", True, 0.1)])
def test_what_is_kept_for_backward(dtype, train, attention, checkpointing, within):
    """The one equation, against every tensor that autograd keeps of a real forward pass."""
    found, planned = kept_for_backward(dtype, train, attention, checkpointing)
    assert planned == pytest.approx(found, rel=within)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", ["all", "cue", "lora"])
def test_what_a_mixture_of_experts_keeps(dtype, train):
    """Of the routed experts, and of the copies of a token's state that they read and return."""
    found, planned = kept_for_backward(dtype, train, "sdpa", False, experts=True)
    assert planned == pytest.approx(found, rel=0.05)


# ---------------------------------------------------------------------------- consequences

B2, B8 = plan.published("Qwen/Qwen3-VL-2B-Instruct"), plan.published("Qwen/Qwen3-VL-8B-Instruct")


def test_eight_gpus_hold_an_eighth_each():
    one, eight = (plan.plan(plan.Run(gpus=n), B2, B8) for n in (1, 8))
    for part in ("student's weights", "teacher's weights", "gradients", "optimizer"):
        assert eight.parts[part] == one.parts[part] / 8
    # 16 rows, not 32, and no prompts that wait for a place
    cache = "key/value cache"
    assert eight.parts[cache] == pytest.approx(one.parts[cache] / 2, rel=0.03)
    assert eight.peaks["sample"] > one.parts["student's weights"]                  # a whole copy


@pytest.mark.parametrize("change, phase", [
    (dict(gradient_checkpointing=True), "learn"), (dict(sample_batch=8), "sample"),
    (dict(micro_batch_tokens=8192), "learn"), (dict(offload_optimizer=True), "update"),
    (dict(offload_teacher=True), "update"), (dict(train="language"), "learn"),
    (dict(train="cue"), "update"), (dict(max_new_tokens=1024), "sample")])
def test_each_saving_lowers_the_phase_it_is_for(change, phase):
    before, after = (plan.plan(plan.Run(**more), B2, B8) for more in ({}, change))
    assert after.peaks[phase] < 0.95 * before.peaks[phase]


def test_offloaded_weights_are_counted_in_cpu_memory():
    made = plan.plan(plan.Run(offload_optimizer=True, offload_teacher=True), B2, B8)
    counts = plan.count(plan.dimensions(B2)).total + plan.module_size(plan.dimensions(B2), 5)[1]
    assert made.host["optimizer"] == (4 + 8 + 4) * counts       # masters, moments, gradients
    assert made.host["teacher"] > 2 * plan.count(plan.dimensions(B8)).total


def test_a_view_is_planned_and_its_pictures_wait_as_well():
    told, shown = (plan.plan(plan.Run(privilege=name), B2) for name in ("cue", "view+cue"))
    assert shown.host["pictures of the batch"] == 2 * told.host["pictures of the batch"]
    assert shown.peaks == told.peaks
    assert "count twice" in plan.report(distill.Config(student=str(qwen.TINY), privilege="view"))


def test_a_backbone_that_is_its_own_teacher_is_held_once():
    shared, copied = (plan.plan(plan.Run(train=train), B2) for train in ("cue", "language"))
    assert shared.parts["teacher's weights"] == 0 < copied.parts["teacher's weights"]
    averaged = plan.plan(plan.Run(teacher="ema"), B2)
    assert averaged.parts["teacher's weights"] == 2 * copied.parts["teacher's weights"]


@pytest.mark.parametrize("config", [TINY, {**shape(), "model_type": "qwen3_vl_moe", "text_config": {
    **shape()["text_config"], **EXPERTS}}], ids=["tiny", "experts"])
def test_adapters_are_counted(config):
    model = of_class(config)
    made = plan.plan(run_of(train="lora", lora_rank=3, cue_recovery=False), config)
    found = sum(p.numel() for p in lora.attach(model, rank=3).parameters())
    assert made.parameters["adapters"] == made.parameters["trained"] == found > 0
    assert made.parameters["teacher"] == 0


def test_adapters_of_the_8b_fit_48_gb():
    """One backbone is student and teacher. Trained whole, it fits only with both the optimizer and
    the teacher in CPU memory."""
    for train, fits in (("lora", True), ("language", False)):
        run = plan.Run(train=train, max_pixels=1310720)
        changed, made = plan.make_fit(run, 48e9, B8)
        flags = plan.flags(changed)
        assert made.peak < 48e9 and ("--offload" not in " ".join(flags)) == fits, flags


def table_rows() -> list[str]:
    """The table of docs/memory.md: for each student, teacher and --train what `--plan` proposes."""
    letters = {"offload_teacher": "T", "offload_optimizer": "O", "score_privilege": "P"}
    rows = []
    for student, teacher, train in (
            ("2B", "self", "all"), ("2B", "self", "language"), ("2B", "self", "cue"),
            ("2B", "8B", "all"), ("2B", "8B", "cue"), ("8B", "self", "all"),
            ("8B", "self", "lora"), ("8B", "self", "cue"),
            ("8B", "32B", "all"), ("8B", "32B", "cue")):
        name = "self" if teacher == "self" else f"Qwen/Qwen3-VL-{teacher}-Instruct"
        cells = []
        for gpus, memory in ((1, 24), (1, 48), (1, 80), (8, 80)):
            config = distill.read_config(["--student", f"Qwen/Qwen3-VL-{student}-Instruct",
                                          "--teacher", name, "--train", train, "--gpus", str(gpus)])
            sized, said = plan.fitted(config[0], memory)
            run, (models, _, _) = plan.from_settings(sized), plan.read_models(sized)
            peak = f"{plan.plan(run, *models).peak / 1e9:.0f} GB"
            flags = [letter for flag, letter in letters.items() if getattr(sized, flag)]
            cells.append("no" if "Nor with" in said else " ".join(
                [f"{peak}, R{run.sample_batch}, M{run.micro_batch_tokens // 1024}k", *flags]))
        rows.append(f"| {student} | {teacher} | {train} | {' | '.join(cells)} |")
    return rows


def test_the_memory_pages_table_is_the_plans():
    page = (ROOT / "docs" / "memory.md").read_text()
    rows = table_rows()
    assert all(row in page for row in rows), "docs/memory.md should have\n" + "\n".join(rows)


@pytest.mark.parametrize("train", ["language", "cue"])
def test_the_2b_fits_24_gb(train):
    run = plan.Run(train=train, max_pixels=1310720)
    settings, made = plan.make_fit(run, 24e9, B2)
    assert made.peak <= 24e9 < plan.plan(run, B2).peak
    changed = distill.read_config(["--student", "Qwen/Qwen3-VL-2B-Instruct", "--train", train,
                                   "--max-pixels", "1310720", *" ".join(plan.flags(settings)).split()])[0]
    assert plan.plan(plan.from_settings(changed), B2).peak == made.peak      # real flags, enough


def test_no_flag_is_given_that_is_not_needed():
    run = plan.Run(max_pixels=1310720)
    changed, made = plan.make_fit(run, 24e9, B2)
    assert len(changed) > 1
    for left_out in changed:
        rest = {k: v for k, v in changed.items() if k != left_out}
        assert plan.plan(plan.replace(run, **rest), B2).peak > 24e9, left_out


# ---------------------------------------------------------------------------- the command

def test_plan_prints_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill, "build_models", None)
    monkeypatch.setattr(distill.checks, "check_data", None)
    distill.main(["--student", "Qwen/Qwen3-VL-2B-Instruct",
                  "--teacher", "Qwen/Qwen3-VL-8B-Instruct", "--data", "nowhere.jsonl",
                  "--plan", "--gpu-memory", "80", "--gpus", "8"])
    out = capsys.readouterr().out
    assert "the table in plan.py, not the hub" in out and "8 x cuda" in out
    assert re.search(r"student +2,127\.5 M", out) and re.search(r"teacher +8,767\.1 M", out)
    assert "fits in 80 GB on each of 8 GPUs" in out
    pasted = shlex.split(next(line for line in out.splitlines() if "distill.py" in line))
    assert pasted[:4] == ["torchrun", "--nproc-per-node", "8", "distill.py"]
    config = distill.read_config(pasted[4:])[0]
    assert (config.teacher, config.data) == ("Qwen/Qwen3-VL-8B-Instruct", "nowhere.jsonl")
    config.gpus = 8
    models = [plan.published(name) for name in (config.student, config.teacher)]
    assert plan.plan(plan.from_settings(config), *models).peak < 80e9
    assert list(tmp_path.iterdir()) == []


def test_a_proposed_value_that_is_a_default_is_still_in_the_command():
    """The tiny student's own defaults would else take its place: 8,192 tokens, in place of 0."""
    asked = distill.read_config(["--seed", "3"])[0]
    assert asked.micro_batch_tokens == 8192
    eager = distill.read_config(["--attention", "eager"])[0]
    assert ("attention", "sdpa") in plan.changes(plan.from_settings(eager))
    sized = dataclasses.replace(asked, micro_batch_tokens=0)
    again = distill.read_config(shlex.split(plan.command(1, asked, sized))[2:])[0]
    assert (again.micro_batch_tokens, again.seed, again.steps) == (0, 3, asked.steps)


def test_plan_reads_the_folder_of_a_checkpoint(capsys):
    distill.main(["--plan", "--device", "cpu", "--gpu-memory", "24"])
    out = capsys.readouterr().out
    assert f"shape from {qwen.TINY}" in out and "float32" in out and "fits in 24 GB" in out


@pytest.mark.parametrize("student, message", [
    ("nobody-at-all/no-such-model", "neither a folder nor one of"),
    ("{folder}", "not that of a Qwen3-VL")])
def test_an_unknown_shape_is_one_line(tmp_path, student, message):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "text_config": {}}')
    with pytest.raises(SystemExit, match=message) as error:
        distill.main(["--student", student.format(folder=tmp_path), "--plan"])
    assert "\n" not in str(error.value)
