"""tests/speed/step.py - the whole step: where its time goes, and against whom it is fast.

    python tests/speed/step.py            about ten minutes on one slow core
    python tests/speed/step.py --quick    under one minute; noisy
    OMP_NUM_THREADS=1 is set unless you set it; the numbers of README.md were made so.

Four questions, on the CPU, on copies that do not learn (a rate of 1e-12), so all rounds are alike.
1) Phases. Where do the seconds of one step of the tiny default go?
2) Plain. Our step against the same step as one would write it first: the class's generate(), one
   padded batch, whole logits, pictures decoded and read by the tower for every pass.
3) TRL. Our step against trl's DistillationTrainer, which takes pictures: same checkpoint, records,
   batch, limit, forward KL, float32, no privilege and no module (it has neither). Needs trl (see
   README.md); without it this part says so and is left out. Its loop is not timed, only its step.
   The tiny model's answers are all short (20 to 60 tokens). A real model's are not, so 2) and 3)
   are run again with random weights, which say anything, and eight stop ids: geometric lengths.
4) Frozen. --freeze-vision with and without reading each picture once, on a random model whose tower
   and language model stand to each other as in the 2B: 24 blocks and 28 layers, an eighth as wide.

Contenders take turns in one process. Seconds are CPU seconds of this process, since others may
share the machine; medians over the rounds. The last line is one JSON object.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

import cue_recovery  # noqa: E402
import distill  # noqa: E402
import model as qwen  # noqa: E402
from scale import checkpoint, checks  # noqa: E402
import teacher as teaching  # noqa: E402
from scale import vision  # noqa: E402
from data import records as record_files, toy  # noqa: E402
from scale.optimizer import Optimizer  # noqa: E402

clock = time.process_time


# ---------------------------------------------------------------------------- contenders

def our_setting(**changes) -> distill.Config:
    return distill.Config(**{**distill.TOY, "sample_batch": 64, **changes})


def optimizer_of(student, train="all") -> Optimizer:
    return Optimizer(distill.choose_weights(student, train), lr=1e-12, cue_lr=1e-12, warmup=1,
                     steps=1000, final=1.0, clip=1.0)


def ours(student, teacher, processor, config):
    """A function (records, step) -> mean length, that makes one step of distill.py."""
    optimizer = optimizer_of(student, config.train)
    scale = distill.scale_for(config, student, teacher, processor)

    def step(records, number):
        metrics, _ = distill.run_step(student, teacher, processor, records, config, number,
                                      optimizer, scale)
        return metrics["length"]
    return step


def plain(student, teacher, processor, config):
    """The same step, written as one would write it first."""
    optimizer = optimizer_of(student, config.train)
    stops = torch.tensor(sorted(processor.stop_ids))

    def logits_of(model, records, ids, hint):
        prompts = [processor.prompt(r, hint(r)) for r in records]
        both = processor.batch([replace(prompt, ids=prompt.ids + row)
                                for prompt, row in zip(prompts, ids.tolist())])
        return model(**both, use_cache=False).logits[:, -ids.shape[1] - 1:-1]

    def step(records, number):
        torch.manual_seed(number)
        batch = processor.batch([processor.prompt(r) for r in records])
        batch.pop("position_ids")                   # the class finds them by itself
        student.eval()
        with torch.no_grad():
            ids = student.generate(**batch, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                                   max_new_tokens=config.max_new_tokens,
                                   eos_token_id=stops.tolist(), pad_token_id=processor.pad_id,
                                   suppress_tokens=processor.banned_ids)
        ids = ids[:, batch["input_ids"].shape[1]:]
        stopped = torch.isin(ids, stops)
        ends = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, ids.shape[1])
        mask = torch.arange(ids.shape[1]) < ends[:, None]
        student.train()
        with torch.no_grad():
            q = logits_of(teacher, records, ids,
                          lambda r: teaching.hint(r, config.privilege)).log_softmax(-1)
        p = logits_of(student, records, ids, lambda r: None).log_softmax(-1)
        nats = (q.exp() * (q - p)).sum(-1) * mask
        (nats.sum(1) / ends).mean().backward()
        optimizer.step(number)
        return float(ends.float().mean())
    return step


def trl_trainer(folder, defaults: bool, max_new_tokens: int, size: int):
    """A function (records, step) -> mean length, that makes one step of trl's DistillationTrainer.

    folder: a checkpoint with the tiny one's tokenizer and picture settings.
    defaults: trl's own gradient checkpointing and bf16 instead of our settings (none, float32).
    """
    from datasets import Dataset
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLProcessor
    from transformers import Qwen3VLForConditionalGeneration
    from trl import DistillationConfig, DistillationTrainer

    class Processor(Qwen3VLProcessor):       # its video part needs torchvision, which is not here
        def check_argument_for_proper_class(self, name, argument):
            if argument is not None or name != "video_processor":
                return super().check_argument_for_proper_class(name, argument)

    own = qwen.Processor(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(qwen.TINY / "tokenizer.json")),
        eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left")
    template = (qwen.TINY / "chat_template.jinja").read_text()
    pictures = Qwen2VLImageProcessorPil(
        patch_size=own.patch, merge_size=own.merge, temporal_patch_size=own.temporal,
        image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=own.min_pixels,
        max_pixels=own.max_pixels)
    processor = Processor(pictures, tokenizer, None, chat_template=template)
    load = Qwen3VLForConditionalGeneration.from_pretrained
    student, teacher = (load(folder, dtype=torch.float32) for _ in range(2))
    settings = {} if defaults else dict(gradient_checkpointing=False, bf16=False)
    arguments = DistillationConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, report_to=[], per_device_train_batch_size=size,
        max_completion_length=max_new_tokens, temperature=1.0, beta=0.0, learning_rate=1e-12,
        max_steps=1000, generation_kwargs={"suppress_tokens": own.banned_ids},
        disable_tqdm=True, **settings)
    # one row, so that it can be made; the steps below are handed their records
    row = {"prompt": [{"role": "user", "content": "How many?"}], "images": []}
    trainer = DistillationTrainer(model=student, teacher_model=teacher, args=arguments,
                                  train_dataset=Dataset.from_list([row] * size),
                                  processing_class=processor)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def step(records, number):
        torch.manual_seed(number)
        inputs = [{"prompt": [{"role": "system", "content": qwen.SYSTEM},
                              {"role": "user", "content": r["question"]}],
                   "images": [Image.open(path) for path in r["images"]]} for r in records]
        trainer.training_step(trainer.model, inputs, None)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(trainer._buffered_inputs[0]["completion_mask"].sum(1).float().mean())
    return step


def ragged_checkpoint() -> Path:
    """The tiny checkpoint with random weights and eight stop ids: answers of geometric length.

    Each token stops with a chance of about 8 in 470: 32 rows have a mean near 59, and the longest
    is near 240. Nothing can be learnt from it but the time.
    """
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration
    folder = Path(tempfile.mkdtemp())
    processor = qwen.Processor(qwen.TINY)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration._from_config(AutoConfig.from_pretrained(qwen.TINY))
    checkpoint.save_model(model, processor, folder / "ragged")
    path = folder / "ragged" / "generation_config.json"
    settings = json.loads((qwen.TINY / "generation_config.json").read_text())
    words = sorted(set(processor.vocab.values()) - set(processor.banned_ids) - processor.stop_ids)
    settings["eos_token_id"] = [*settings["eos_token_id"], *words[:6]]
    path.write_text(json.dumps(settings))
    return folder / "ragged"


def race(contenders: dict, batches: list) -> dict:
    """Every contender makes every step, in turns; the first batch only warms up.

    Returns {name: {"seconds", "wall", "length"}}: medians of CPU and wall seconds, mean tokens a
    row (each contender draws its own answers, so look at these before believing a ratio).
    """
    taken = {name: [] for name in contenders}
    for number, batch in enumerate(batches):
        for name, step in contenders.items():
            start, wall = clock(), time.perf_counter()
            length = step(batch, number)
            taken[name].append((clock() - start, time.perf_counter() - wall, length))
    return {name: {"seconds": statistics.median(row[0] for row in rows[1:]),
                   "wall": statistics.median(row[1] for row in rows[1:]),
                   "length": statistics.mean(row[2] for row in rows[1:])}
            for name, rows in taken.items()}


# ---------------------------------------------------------------------------- phases

class Phases:
    """CPU seconds of the parts of training_step, by wrapping what it calls; `undo` unwraps it."""

    def __init__(self, student, teacher, processor, optimizer):
        self.seconds, self.undo, self.side, self.left = {}, contextlib.ExitStack(), "", {}
        self.time(processor, "prompt", "pictures and prompts")
        self.time(distill, "read_prompts", "pictures and prompts", inside=("vision, read once",))
        self.time(processor, "batch", "padding into batches")
        self.time(vision, "read_once", "vision, read once")
        self.time(distill, "sample_responses", "sampling: drawing and cache", inside=(
            "padding into batches", "prefill: vision", "prefill: text", "decode: text"))
        self.time(distill, "distill_loss", "loss and entropy")
        self.time(optimizer, "step", "clip and AdamW")
        self.time(torch.Tensor, "backward", "")
        for name, model in (("teacher", teacher), ("student", student)):
            for part, module in (("vision", model.model.visual),
                                 ("text", model.model.language_model)):
                self.time(module, "forward", lambda module, args, kwargs, name=name, part=part:
                          self.forward_name(name, part, kwargs))

    def add(self, name, seconds):
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def forward_name(self, name, part, kwargs):
        if torch.is_grad_enabled() or name == "teacher":
            return f"{name}: {part}"
        embeds = kwargs.get("inputs_embeds")
        return f"{'decode' if embeds is not None and embeds.shape[1] == 1 else 'prefill'}: {part}"

    def time(self, owner, attribute, name, inside=()):
        """Replace owner.attribute by one that adds its time to `name`, less that of `inside`."""
        plain = getattr(owner, attribute)
        had = attribute in vars(owner)

        def timed(*args, **kwargs):
            # a thread of read_prompts, whose time is in there: the clock is the whole process's
            if threading.current_thread() is not threading.main_thread():
                return plain(*args, **kwargs)
            label = name(owner, args, kwargs) if callable(name) else name
            if attribute == "backward":
                return self.backward(plain, args)
            before = sum(self.seconds.get(part, 0.0) for part in inside)
            start = clock()
            out = plain(*args, **kwargs)
            spent = clock() - start
            self.add(label, spent - (sum(self.seconds.get(p, 0.0) for p in inside) - before))
            if label == "student: text":             # the moment at which backward comes back here
                kwargs["inputs_embeds"].register_hook(lambda g: self.left.update(text=clock()))
            if label == "student: vision" and out.pooler_output.requires_grad:
                self.left["vision"] = None
            return out
        setattr(owner, attribute, timed)
        self.undo.callback(lambda: setattr(owner, attribute, plain) if had
                           else delattr(owner, attribute))

    def backward(self, plain, args):
        """Text, then vision, then the embedding: autograd walks back in the order of creation."""
        start = clock()
        plain(*args)
        end = clock()
        self.add("backward: text", self.left.get("text", end) - start)
        last = self.left.pop("vision", None) or self.left.get("text", end)
        self.add("backward: vision", last - self.left.get("text", end))
        self.add("backward: embedding", end - last)
        self.left.clear()


def phases(batches, config) -> dict[str, float]:
    """{phase: CPU seconds a step}, with "the rest" (metrics, decoding, Python between)."""
    student, teacher, processor = models(config)
    optimizer = optimizer_of(student, config.train)
    scale = distill.scale_for(config, student, teacher, processor)

    def step(number):
        distill.run_step(student, teacher, processor, batches[number], config, number, optimizer,
                         scale)
    step(0)
    watch = Phases(student, teacher, processor, optimizer)

    def patched(module, args, out):               # grad of the first block's input: vision is done
        if out.requires_grad:
            out.register_hook(lambda g: watch.left.update(vision=clock()))
    handle = student.model.visual.patch_embed.register_forward_hook(patched)
    total = []
    with watch.undo:
        for number in range(1, len(batches)):
            start = clock()
            step(number)
            total.append(clock() - start)
    handle.remove()
    out = {name: seconds / len(total) for name, seconds in watch.seconds.items()}
    out["the rest"] = statistics.mean(total) - sum(out.values())
    return out | {"all": statistics.mean(total)}


def models(config):
    """Student, teacher and processor, as `python distill.py` makes them."""
    with contextlib.redirect_stdout(sys.stderr):
        return distill.build_models(config)


# ---------------------------------------------------------------------------- the frozen tower

def like_the_2b(config, tokens: int):
    """Random student, teacher, processor: the 2B's proportions, an eighth as wide.

    2B: tower 24 blocks of 1024, 4096 in the MLP; 28 layers of 2048, 6144 in the MLP. The vocabulary
    stays the tiny one's, so the head's share (a fifth of the 2B's work a token) is missing.
    """
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration
    shape = AutoConfig.from_pretrained(qwen.TINY)
    shape.vision_config.update(dict(depth=24, hidden_size=128, intermediate_size=512, num_heads=4,
                                    out_hidden_size=256, deepstack_visual_indexes=[5, 11, 17]))
    shape.text_config.update(dict(num_hidden_layers=28, hidden_size=256, intermediate_size=768,
                                  num_attention_heads=8, num_key_value_heads=4, head_dim=32))
    torch.manual_seed(0)
    student = Qwen3VLForConditionalGeneration._from_config(shape, attn_implementation="sdpa")
    teacher = teaching.frozen_copy(student)
    cue_recovery.attach(student, every=5)
    processor = qwen.Processor(qwen.TINY, min_pixels=64, max_pixels=1 << 22)
    # every answer is as long as it may be, in all contenders
    processor.sampling["banned_ids"] = sorted({*processor.banned_ids, *processor.stop_ids})
    return student, teacher, processor


def frozen(rounds: int, rows: int, size: tuple[int, int], tokens: int) -> dict:
    """--freeze-vision with and without reading each picture once."""
    config = our_setting(train="language", attention="sdpa", max_new_tokens=tokens,
                         micro_batch_tokens=16384)
    trio = like_the_2b(config, tokens)
    once = ours(*trio, config)

    def thrice(records, number):
        read, vision.read_once = vision.read_once, lambda prompts, *models, rows: prompts
        try:
            return once(records, number)
        finally:
            vision.read_once = read
    records = [{"id": str(n), "images": [Image.effect_noise(size, 90).convert("RGB")],
                "question": "What does the picture show, and how many of them are there? " * 4,
                "answer": "2", "cue": "The picture shows a red circle at row 1 column 1."}
               for n in range(rows)]
    got = race({"three times": thrice, "once": once}, [records] * (rounds + 1))
    visual = processor_tokens(trio[2], records[0])
    return {"ratio": got["three times"]["seconds"] / got["once"]["seconds"],
            "visual_tokens": visual[0], "prompt_tokens": visual[1], "answer_tokens": tokens,
            **{name: row["seconds"] for name, row in got.items()}}


def processor_tokens(processor, record) -> tuple[int, int]:
    ids = processor.prompt(record).ids
    return ids.count(processor.image_id), len(ids)


# ---------------------------------------------------------------------------- for people

def markdown(title: str, rows: list[tuple]) -> None:
    print(f"\n{title}\n")
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for n, row in enumerate(rows):
        print("| " + " | ".join(str(cell).ljust(w) for cell, w in zip(row, widths)) + " |")
        if n == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")


def show_race(title: str, got: dict) -> None:
    rows = [("contender", "CPU s a step", "steps a minute", "wall s", "tokens a row", "x ours",
             "x ours, a token")]
    mine = got["ours"]
    for name, row in got.items():
        ratio = row["seconds"] / mine["seconds"]
        rows.append((name, f"{row['seconds']:.3f}", f"{60 / row['seconds']:.1f}",
                     f"{row['wall']:.3f}", f"{row['length']:.1f}",
                     f"{ratio:.2f}", f"{ratio * mine['length'] / row['length']:.2f}"))
    markdown(title, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller frozen part")
    parser.add_argument("--batch", type=int, default=32, help="rows a step")
    parser.add_argument("--rounds", type=int, default=0, help="0: 11, or 2 with --quick")
    args = parser.parse_args()
    rounds = args.rounds or (2 if args.quick else 11)
    checks.quiet()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    train = record_files.load(toy.default() / "train.jsonl", ("cue",))
    batches = [distill.batch_of(train, n, args.batch, 0) for n in range(rounds + 1)]
    result = {"benchmark": "step", "batch": args.batch, "rounds": rounds,
              "threads": torch.get_num_threads()}

    for name, config in (("all trained", our_setting()),
                         ("--freeze-vision", our_setting(train="language"))):
        got = phases(batches, config)
        markdown(f"Phases, {name}", [("phase", "CPU ms a step", "share %")] + [
            (phase, f"{1e3 * s:.1f}", f"{100 * s / got['all']:.1f}") for phase, s in got.items()])
        result[f"phases {name}"] = {phase: round(s, 4) for phase, s in got.items()}

    def compete(title, batches, config, entrants):
        """All of `entrants` against ours, the base of the ratio, on the same records."""
        got = race({"ours": ours(*models(config), config), **entrants}, batches)
        show_race(title, got)
        for name in entrants:
            result[f"x {name}, {title}"] = round(got[name]["seconds"] / got["ours"]["seconds"], 3)

    config, ragged = our_setting(), ragged_checkpoint()
    wild = our_setting(student=str(ragged), max_new_tokens=384)
    fewer = batches[:2 + rounds // 2]
    compete("short answers", batches, config, {"plain": plain(*models(config), config)})
    compete("ragged answers", fewer, wild, {"plain": plain(*models(wild), wild)})

    alike = dict(privilege="none", cue_recovery=False, attention="sdpa")
    config = our_setting(**alike)
    wild = our_setting(student=str(ragged), max_new_tokens=384, **alike)
    try:
        import trl
        release = f"trl {trl.__version__}"
        trl_short = {release + how: trl_trainer(qwen.TINY, how != "", 96, args.batch)
                     for how in ("", " with its defaults")}
        trl_ragged = {release: trl_trainer(ragged, False, 384, args.batch)}
    except ImportError as error:
        print(f"\nno comparison with trl: {error}")
    else:
        compete("short answers, no privilege", batches, config, trl_short)
        compete("ragged answers, no privilege", fewer, wild, trl_ragged)

    shape = dict(rows=2, size=(128, 96), tokens=16) if args.quick else dict(
        rows=4, size=(256, 160), tokens=64)
    got = frozen(rounds=2 if args.quick else 5, **shape)
    markdown("--freeze-vision, a 2B's proportions", [
        ("visual / prompt / answer tokens", "three times, CPU s", "once, CPU s", "ratio"),
        (f"{got['visual_tokens']} / {got['prompt_tokens']} / {got['answer_tokens']}",
         f"{got['three times']:.2f}", f"{got['once']:.2f}", f"{got['ratio']:.2f}")])
    result["x read once"] = round(got["ratio"], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
