"""data/make_tiny.py - make the tiny Qwen3-VL checkpoint that `python distill.py` starts from.

The idea.  A real Qwen3VLForConditionalGeneration, only small, taught from nothing on the toy world
so that it starts in the situation the method was made for:

    it sees              asked to describe the picture, it lists every object
    it follows a hint    given the visible facts, it reasons to the right answer
    it does not look     asked a question alone, it glances at the upper rows, or invents
    it parrots an answer hinted with the answer, it mostly says "the [hint] says 4"

The last two are planted, in the open, by the supervised answers below. Real instruct models do
both (the paper's table 8); a model of 2 million parameters would not by itself. A run on this
checkpoint shows the mechanism of the method. It is no evidence about 2B models.

In:  nothing.  Out: data/tiny-qwen3-vl/, an ordinary Hugging Face folder (bf16, under 8 MB).
Use: python data/make_tiny.py          docs/results.md says how long it takes
     python data/make_tiny.py --grow data/tiny-qwen3-vl --layers 10 --looks --steps 250 --lr 5e-4 \
         --out data/tiny-teacher     the bigger teacher of analysis/grid.sh: more layers; it looks

The layout is Qwen3-VL's: byte-level BPE with Qwen's control tokens (at this vocabulary's own ids),
M-RoPE, DeepStack, tied embeddings. Patch 8 instead of 16: one visual token per 16 x 16 pixels.
"""
from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import toy  # noqa: E402
from model import Processor, load  # noqa: E402
from rollout import sample  # noqa: E402
from scale.checkpoint import save_model  # noqa: E402

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>")
TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Shares of what the base does when it is asked a question without a hint.
GLANCE, INVENT = 0.60, 0.20           # the rest looks properly
PARROT = 0.70                         # answers to an answer or rationale hint that only cite it


# ---------------------------------------------------------------------------- the folder

def write_folder(folder: Path, layers: int, hidden: int) -> None:
    """config, tokenizer, chat template, preprocessor and generation config; no weights yet."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    ids = {name: tokenizer.token_to_id(name) for name in CONTROL}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4],
            "mrope_interleaved": True}
    heads = hidden // 32
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64,    # rounded up, as Qwen does
            hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=32,
            max_position_embeddings=4096, rope_parameters=rope, tie_word_embeddings=True),
        vision_config=dict(
            depth=2, hidden_size=64, intermediate_size=192, num_heads=2, patch_size=8,
            spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=hidden,
            num_position_embeddings=256, deepstack_visual_indexes=[0]),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True, architectures=["Qwen3VLForConditionalGeneration"])
    config.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    stop = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    files = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast",
                                  "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessorFast",
                                     "patch_size": 8, "merge_size": 2, "temporal_patch_size": 2,
                                     "size": {"shortest_edge": 4 * 256, "longest_edge": 256 * 256},
                                     "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        "generation_config.json": {"eos_token_id": stop, "pad_token_id": ids["<|endoftext|>"]},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def train_tokenizer(size: int = 512) -> Tokenizer:
    """A byte-level BPE learnt on the toy world's own text; other text is split into bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    text = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "\n[Hint]: "]
    for _ in range(4000):
        _, prompt, hint, answer = example(rng)
        text += [prompt, hint or "", answer]
    trainer = trainers.BpeTrainer(vocab_size=size - len(CONTROL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens(list(CONTROL))          # behind the vocabulary, as in Qwen's
    return tokenizer


# ---------------------------------------------------------------------------- what it is taught

def glance(question: toy.Question, scene: toy.Scene) -> list[toy.Thing]:
    """What a lazy look finds: the last row is never reached."""
    seen = [t for t in question.relevant(scene.things) if t.row < scene.rows]
    if question.kind == "locate" and not seen:           # it must name some row: the one above
        seen = [replace(t, row=t.row - 1) for t in question.relevant(scene.things)]
    return seen


def invent(question: toy.Question, scene: toy.Scene, rng: random.Random) -> list[toy.Thing]:
    """Evidence with every second object moved, misnamed or made up."""
    seen = []
    for thing in question.relevant(scene.things):
        if rng.random() < 0.5:
            thing = replace(thing, row=rng.randint(1, scene.rows),
                            column=rng.randint(1, scene.columns),
                            shape=question.shape or rng.choice(toy.SHAPES))
        seen.append(thing)
    return sorted(set(seen), key=lambda t: (question.colours.index(t.colour), t))


def alone(question, scene, rng, looks: bool) -> list[toy.Thing]:
    """The evidence that the base states without a hint; all of it if it `looks`."""
    if looks:
        return question.relevant(scene.things)
    dice = rng.random()
    if dice < GLANCE:
        return glance(question, scene)
    if dice < GLANCE + INVENT:
        return invent(question, scene, rng)
    return question.relevant(scene.things)


def example(rng: random.Random, looks: bool = False, describe: float = 0.35):
    """One supervised example: (picture, question, hint or None, answer)."""
    scene = toy.make_scene(rng, "train")
    picture = toy.draw(scene, rng)
    dice = rng.random()
    if dice < describe:
        return picture, "Describe the picture.", None, f"I see {toy.listing(scene.things)}."
    if dice < describe + 0.08:
        return (picture, *any_question(scene, rng))
    question = toy.make_question(scene, rng)
    record = toy.make_record(scene, question, "", "")
    kind = rng.choices(("alone", "cue", "answer", "rationale"), (0.4, 0.3, 0.15, 0.15))[0]
    if kind == "cue":
        return picture, question.text, record["cue"], question.solution(
            question.relevant(scene.things))
    evidence = alone(question, scene, rng, looks)
    if kind == "alone":
        return picture, question.text, None, question.solution(evidence)
    ending = f"The answer is \\boxed{{{record['answer']}}}."
    if rng.random() < PARROT:
        return picture, question.text, record[kind], f"The [hint] says {record['answer']}. {ending}"
    return picture, question.text, record[kind], f"I see {toy.listing(evidence)}. {ending}"


def any_question(scene: toy.Scene, rng: random.Random):
    """(question, hint, answer) of kinds that the toy world lacks: teaches the form, not the facts.

    With a hint the base repeats it; without one it guesses. So it can start on other data.
    """
    colour, shape = rng.choice(list(toy.COLOURS) + ["gray", "black", "brown"]), rng.choice(
        toy.SHAPES + ("rectangle",))
    question, answers = rng.choice((
        (f"is there a {colour} {shape} here?", ("yes", "no")),
        (f"is a {shape} shown?", ("yes", "no")),
        (f"which color has the {shape}?", list(toy.COLOURS) + ["gray", "black", "brown", "teal"]),
        ("which shape is shown?", toy.SHAPES + ("rectangle",)),
        (f"what {colour} shape is shown?", toy.SHAPES + ("rectangle",))))
    answer = rng.choice(answers)
    hint = answer if rng.random() < 0.5 else None
    return question, hint, f"The answer is \\boxed{{{answer}}}."


# ---------------------------------------------------------------------------- supervised training

@torch.no_grad()
def grow(model, folder) -> None:
    """Start `model` from a shallower checkpoint; the added layers begin as the identity."""
    small = load(folder)[0].state_dict()
    different = [name for name, weight in model.state_dict().items()
                 if name in small and weight.shape != small[name].shape]
    if different:
        raise ValueError(f"{folder} cannot grow into this shape: {different[0]} differs; "
                         "change only --layers")
    model.load_state_dict(small, strict=False)
    for layer in model.model.language_model.layers[model_depth(small):]:
        layer.self_attn.o_proj.weight.zero_()            # both residual branches add nothing yet
        layer.mlp.down_proj.weight.zero_()


def model_depth(weights) -> int:
    prefix = "model.language_model.layers."
    return 1 + max(int(k[len(prefix):].split(".")[0]) for k in weights if k.startswith(prefix))


def supervised_loss(model, processor, examples) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, the stop token included."""
    stop = processor.control["<|im_end|>"]
    prompts = [processor.prompt({"images": [p], "question": q}, hint) for p, q, hint, _ in examples]
    answers = [processor.encode(a) + [stop] for *_, a in examples]
    lengths = torch.tensor([len(a) for a in answers])
    T = int(lengths.max())
    ids = torch.tensor([a + [processor.pad_id] * (T - len(a)) for a in answers])
    mask = torch.arange(T) < lengths[:, None]
    # padded on the left, so that the answers are the last T columns
    batch = processor.batch([replace(prompt, ids=prompt.ids + answer)
                             for prompt, answer in zip(prompts, ids.tolist())])
    hidden = model.model(**batch).last_hidden_state
    logits = model.lm_head(hidden[:, -T - 1:-1][mask])    # logit t predicts token t + 1
    return torch.nn.functional.cross_entropy(logits, ids[mask])


@torch.no_grad()
def report(model, processor, count: int, seed: int = 1) -> str:
    """Greedy accuracy on test scenes, by kind of hint. 'seen' is the share of perfect captions."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        scene = toy.make_scene(rng, "test")
        question = toy.make_question(scene, rng)
        rows.append((toy.draw(scene, rng), toy.make_record(scene, question, "", ""), scene))
    out = []
    for kind in ("seen", "alone", "cue", "answer", "rationale"):
        prompts = [processor.prompt(
            {"images": [picture],
             "question": "Describe the picture." if kind == "seen" else record["question"]},
            None if kind in ("seen", "alone") else record[kind]) for picture, record, _ in rows]
        got = sample(model, processor.batch(prompts), max_new_tokens=96, temperature=0,
                     **processor.sampling)
        texts = [processor.decode(ids[:n]) for ids, n in zip(got.ids, got.lengths)]
        if kind == "seen":
            right = [t == f"I see {toy.listing(s.things)}." for t, (_, _, s) in zip(texts, rows)]
        else:
            right = [f"\\boxed{{{r['answer']}}}" in t for t, (_, r, _) in zip(texts, rows)]
        out.append(f"{kind} {sum(right) / count:.2f}")
        if kind == "alone":
            out.append(f"e.g. {texts[0]!r} for {rows[0][1]['answer']}")
    return "  ".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny checkpoint from nothing.")
    parser.add_argument("--out", default=str(Path(__file__).resolve().parent / "tiny-qwen3-vl"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)    # at 2e-3 it never learns the shapes
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grow", default="",
                        help="start from this shallower checkpoint, not from nothing")
    parser.add_argument("--looks", action="store_true",
                        help="answers alone are taught right, without glancing and inventing")
    args = parser.parse_args()
    folder = Path(args.out)
    write_folder(folder, args.layers, args.hidden)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    config = Qwen3VLConfig.from_pretrained(folder)
    model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="eager")
    if args.grow:
        grow(model, args.grow)
    processor = Processor(folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
          f"{config.text_config.vocab_size} tokens, {args.steps} steps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(
        (s + 1) / 100, max(0.02, 1 - s / args.steps) ** 0.7))
    start, total = time.time(), 0.0
    for step in range(1, args.steps + 1):
        loss = supervised_loss(model, processor, [example(rng, args.looks)
                                                  for _ in range(args.batch_size)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        total += loss.item()
        if step % 100 == 0:
            text = report(model, processor, 64) if step % 200 == 0 else ""
            print(f"step {step}  loss {total / 100:.3f}  {time.time() - start:.0f} s  {text}",
                  flush=True)
            total = 0.0
        if step % 400 == 0 or step == args.steps:
            save_model(model.to(torch.bfloat16), processor, folder)
            model.float()
    model, processor = load(folder, attention="eager")
    print(f"{folder} as saved: {report(model, processor, 512)}  ({time.time() - start:.0f} s)")


if __name__ == "__main__":
    main()
