"""scale/plan.py - how much memory a run needs, by arithmetic, before anything is loaded.

The idea.  Memory of a training step is a sum of products of sizes that stand in config.json and in
the settings of the run. It has phases, and the largest decides:

    evaluate  (before the first step) weights + teacher + key/value cache of its answers
    sample    weights + teacher + optimizer + key/value cache of --sample-batch rows
    teach     weights + teacher + optimizer + gradients + the working set of one layer
    learn     weights + teacher + optimizer + gradients + what backward needs of every layer + loss
    update    weights + teacher + masters, moments and gradients, all in float32

In:  the settings, config.json of student and teacher.
Out: a table, and the flags that make it fit.

The one equation.  Bytes that one decoder layer keeps for backward, a token (b bytes a number; w = b
if the layer is trained, else 0, since a frozen matrix needs no input to make a gradient):
    2 D (4 + 2w)  +  A (4 + w + b)  +  K (4 + w)  +  (A + 2 K) b  +  F (3b + w)
    the norms        queries           keys          attention      feed-forward
A mixture of experts holds them all; a token passes k of them, and its state is copied k times.

Run it:  python distill.py --student Qwen/Qwen3-VL-2B-Instruct --plan --gpu-memory 24
Use it alone: imports nothing but the standard library (a hub name that is not in its table asks
huggingface_hub for config.json).

What it assumes (limits, not averages)
1) Prompts and answers are as long as the settings allow, and pictures fill the prompts. So
   a hint changes nothing; with --privilege view the pictures that wait count twice.
2) A micro-batch is full: of rows with short answers for the pictures, of long ones for the rest.
3) On a GPU: ALLOWANCE for the CUDA context, and SLACK for the gaps an allocator leaves. These two
   are assumptions; the rest was compared with measured peaks on a CPU (tests/speed/memory.py).
4) Several GPUs (sharding.py): weights, gradients, optimizer and teacher are cut in N; each GPU also
   holds what is gathered to compute, and the whole model while it samples or is evaluated.
5) A GB is 10^9 bytes; a "24 GB" card has a little more.
Left out: activation offload, tensor and pipeline parallelism, quantised weights.
"""
from __future__ import annotations

import json
import math
import os
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

# Dimension letters: D hidden, F feed-forward (all that a token passes), A all query heads together,
# K all key heads together, V vocabulary, n tokens of a micro-batch, P tokens of a prompt,
# E experts, k experts a token.

GB = 1e9
ALLOWANCE = 1.0 * GB         # CUDA context and libraries
SLACK = 0.05                 # of the peak, for gaps
CHUNK, ROWS = 256, 16        # tokens with logits, and with float32 copies, at one time: loss.py's
ROOM, JOIN = 128, 8          # columns the cache grows by (decoder.py), free places (rollout.py)
GROUP = 4                    # batches of an evaluation whose prompts wait: evaluate.py's
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}

# hidden, layers, heads, key heads, ff, tied head, (experts, of a token, ff of one)
# | vision: depth, hidden, ff, DeepStack after these layers. Instruct and Thinking are alike.
SMALL, LARGE = (24, 1024, 4096, [5, 11, 17]), (27, 1152, 4304, [8, 16, 24])
PUBLISHED = {
    "Qwen/Qwen3-VL-2B": ((2048, 28, 16, 8, 6144, True, None), SMALL),
    "Qwen/Qwen3-VL-4B": ((2560, 36, 32, 8, 9728, True, None), SMALL),
    "Qwen/Qwen3-VL-8B": ((4096, 36, 32, 8, 12288, False, None), LARGE),
    "Qwen/Qwen3-VL-32B": ((5120, 64, 64, 8, 25600, False, None), LARGE),
    "Qwen/Qwen3-VL-30B-A3B": ((2048, 48, 32, 4, 6144, False, (128, 8, 768)), LARGE),
    "Qwen/Qwen3-VL-235B-A22B": ((4096, 94, 64, 4, 12288, False, (128, 8, 1536)), LARGE),
}


# ---------------------------------------------------------------------------- shapes

def published(name: str) -> dict | None:
    """What config.json of a published model says of its shape; None for another name."""
    name = name.removesuffix("-Instruct").removesuffix("-Thinking")
    if name not in PUBLISHED:
        return None
    language, (depth, width, vision_ff, deepstack) = PUBLISHED[name]
    hidden, layers, heads, keys, ff, tied, experts = language
    routed = {} if experts is None else {
        **dict(zip(("num_experts", "num_experts_per_tok", "moe_intermediate_size"), experts)),
        "decoder_sparse_step": 1, "mlp_only_layers": []}
    return {
        "model_type": "qwen3_vl_moe" if experts else "qwen3_vl", "tie_word_embeddings": tied,
        "image_token_id": 151655, "video_token_id": 151656,
        "text_config": {
            "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": keys, "head_dim": 128, "intermediate_size": ff, **routed,
            "vocab_size": 151936, "tie_word_embeddings": tied, "rope_theta": 5_000_000,
            "max_position_embeddings": 262144, "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20],
                             "rope_type": "default"}},
        "vision_config": {
            "depth": depth, "hidden_size": width, "intermediate_size": vision_ff, "num_heads": 16,
            "out_hidden_size": hidden, "deepstack_visual_indexes": deepstack, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
            "num_position_embeddings": 2304}}


def read_config(name: str) -> tuple[dict, int, str]:
    """(config.json, largest picture in pixels, where it is from) of a folder or hub name."""
    folder, pictures = Path(name), {}
    if not folder.is_dir():
        if published(name):
            return published(name), 16_777_216, "the table in plan.py, not the hub"
        try:
            from huggingface_hub import hf_hub_download
            folder = Path(hf_hub_download(name, "config.json")).parent
        except Exception as error:   # offline, no such name, not installed: many kinds
            raise ValueError(
                f"{name} is neither a folder nor one of {', '.join(PUBLISHED)}, and its "
                f"config.json cannot be fetched ({type(error).__name__})") from None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (folder / "preprocessor_config.json").exists():
            pictures = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        size = pictures.get("size") or {}
        pixels = size.get("longest_edge") or pictures.get("max_pixels") or 16_777_216
        dimensions(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: config.json is not that of a Qwen3-VL: {error!r}") from None
    return config, pixels, str(folder)


def dimensions(config: dict) -> SimpleNamespace:
    """The letters above, and the same of the vision tower (v...), from a config.json."""
    text, vision = config["text_config"], config["vision_config"]
    heads, d, layers = text["num_attention_heads"], text["head_dim"], text["num_hidden_layers"]
    experts = text.get("num_experts", text.get("num_local_experts", 0))    # transformers 5's name
    only, step = text.get("mlp_only_layers") or [], text.get("decoder_sparse_step", 1)
    routed = sum(n not in only and (n + 1) % step == 0 for n in range(layers)) if experts else 0
    k, wide = (text["num_experts_per_tok"], text["moe_intermediate_size"]) if routed else (0, 0)
    dense = text["intermediate_size"] if routed < layers else 0
    return SimpleNamespace(
        D=text["hidden_size"], F=max(dense, k * wide), V=text["vocab_size"], d=d, heads=heads,
        A=heads * d, K=text["num_key_value_heads"] * d, layers=layers,
        E=experts, k=k, routed=routed, dense=dense, wide=wide, vheads=vision["num_heads"],
        tied=config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        vD=vision["hidden_size"], vF=vision["intermediate_size"], depth=vision["depth"],
        positions=vision["num_position_embeddings"], out=vision["out_hidden_size"],
        mergers=1 + len(vision["deepstack_visual_indexes"]), merge=vision["spatial_merge_size"],
        side=vision["patch_size"] * vision["spatial_merge_size"],     # pixels, of a visual token
        pixels=(vision.get("in_channels", 3) * vision["temporal_patch_size"]
                * vision["patch_size"]**2))


def count(m) -> SimpleNamespace:
    """Numbers in each part of the model: one layer, embedding, head, vision, total."""
    attention = 2 * m.A * m.D + 2 * m.K * m.D + 2 * m.d + 2 * m.D           # and the norms
    dense, experts = 3 * m.D * m.dense, m.E * (3 * m.D * m.wide + m.D)      # and their router
    layer = attention + max(dense, experts)
    embedding, head = m.V * m.D, 0 if m.tied else m.V * m.D
    block = 4 * m.vD**2 + 2 * m.vD * m.vF + m.vF + 9 * m.vD
    wide = m.merge**2 * m.vD                          # one visual token's patches, side by side
    vision = (m.vD * (m.pixels + 1) + m.positions * m.vD + m.depth * block
              + m.mergers * (wide**2 + wide + m.out * wide + m.out + 2 * wide) - 2 * (wide - m.vD))
    language = (m.layers * attention + (m.layers - m.routed) * dense + m.routed * experts
                + m.D + embedding + head)
    return SimpleNamespace(layer=layer, embedding=embedding, head=head, vision=vision,
                           language=language, total=language + vision)


def module_size(m, every: int) -> tuple[int, int]:
    """(blocks, numbers) of the recovery module; every 0 is distill.py's default.

    Four matrices and two gains before every l-th layer.
    """
    every = every or min(5, max(1, m.layers // 3))
    blocks = len(range(0, m.layers - 1, every))
    return blocks, blocks * (4 * m.D**2 + 2 * m.D)


def adapters(m, rank: int) -> int:
    """Numbers of the adapters beside one layer (lora.py); experts have none."""
    attention = 2 * (m.D + m.A) + 2 * (m.D + m.K)
    return rank * (attention + (3 * (m.D + m.dense) if m.dense else 0))


# ---------------------------------------------------------------------------- activations

def layer_keeps(m, b: int, run, row: int) -> float:
    """Bytes a token that one decoder layer keeps for backward; row: tokens of a row, padded."""
    w = 0 if run.train == "cue" else b                # the input of a matrix that learns, or its A
    f = 0 if run.frozen() and m.k else w              # of one in the feed-forward
    g = 0 if run.frozen() else b                      # of a gain that learns
    norms = m.D * (8 + w + f + 2 * g)                 # computed in float32; output, and before gain
    queries = m.A * (4 + g + b) + m.K * (4 + g)       # q_norm, k_norm, and q after rotation
    core = 2 * m.K * b + m.A * b + 4 * m.heads        # keys, values, and the result
    if run.attention == "eager":                      # repeated for all heads; softmax in float32
        core = 3 * m.A * b + m.heads * row * (4 + (b if b < 4 else 0))
    experts = m.k * (m.D * (b + f) + 40) + 4 * m.E    # results, copies, where from; the router's
    thin = (7 if m.dense else 4) * run.lora_rank * b if run.train == "lora" else 0      # A x
    return norms + queries + core + m.F * (3 * b + f) + experts + thin


def layer_works(m, b: int, row: int, attention: str, padded: bool) -> float:
    """Bytes a token while one decoder layer runs without gradients; padded: with a mask."""
    scores = {"eager": m.heads * row * (8 + b), "sdpa": padded * row * (1 + b)}.get(attention, 0)
    inner = 3 * m.F if not m.k else max(4 * m.F + m.k * m.D, 4 * m.k * m.D)
    return max(2 * m.D * b + inner * b, m.D * (b + 12),
               b * (m.D + 5 * m.A + 2 * m.K) + 8 * m.A) + scores


def layer_returns(m, b: int) -> float:
    """Bytes a token of gradients while backward goes through one decoder layer."""
    return (3 * m.F + 2 * m.k * m.D) * b + m.D * (2 * b + 8)


def block_keeps(m, b: int, picture: int, attention: str) -> float:
    """Bytes a patch that one trained vision block keeps; picture: patches that see each other."""
    scores = m.vheads * 4
    if attention == "eager":
        scores = m.vheads * picture * (4 + (b if b < 4 else 0))
    return b * (11 * m.vD + 2 * m.vF) + scores


def block_works(m, b: int, picture: int, attention: str) -> float:
    """Bytes a patch while one vision block runs without gradients; it rotates in float32."""
    scores = m.vheads * picture * (8 + b) if attention == "eager" else 0
    return max(b * (2 * m.vD + 2 * m.vF), m.vD * (5 * b + 24), m.vD * 5 * b + scores)


def block_returns(m, b: int) -> float:
    """Bytes a patch of gradients while backward goes through one vision block."""
    return b * (2 * m.vF + 5 * m.vD) + 16 * m.vD


def learning(m, b: int, run, n: int, pictures: int, picture: int, row: int) -> tuple[float, float]:
    """Bytes that the student's forward pass keeps, and the most while backward goes through.

    The second counts what is still kept and the gradients between layers. n tokens, in rows of
    `row`; `pictures` of `picture` patches each. What is handed to the model for them (pixels or
    features) is not among these bytes.
    """
    w, patches = (0 if run.frozen() else b), pictures * picture
    layer = layer_keeps(m, b, run, row)
    block = block_keeps(m, b, picture, run.attention)
    # a module that alone is trained needs no gradient from before its first block
    layers = m.layers - (run.train == "cue")
    state, again, block_again = layer, 0, 0
    if run.gradient_checkpointing:                    # inputs only, and one layer is run again
        state, again, block_again = m.D * b, layer, block
    blocks = module_size(m, run.every)[0] if run.cue_recovery else 0
    language = n * (layers * state + blocks * m.D * b + m.D * (4 + 2 * w + b))
    vision = 0
    if run.train == "all":
        inner = m.vD * b if run.gradient_checkpointing else block
        vision += patches * (b * m.pixels + m.depth * inner + m.mergers * 4 * b * m.vD)
    backward = language + vision + n * (layer_returns(m, b) + again)
    if run.train == "all":
        backward = max(backward, vision + patches * (block_returns(m, b) + block_again))
    return language + vision, backward


# ---------------------------------------------------------------------------- the run

@dataclass
class Run:
    """What the plan needs of the settings (distill.Config has fields of the same names)."""
    train: str = "all"
    lora_rank: int = 16
    teacher: str = "self"
    privilege: str = "cue"
    dtype: str = "bfloat16"
    device: str = "cuda"
    attention: str = "sdpa"
    batch_size: int = 128
    samples_per_prompt: int = 1
    sample_batch: int = 32
    micro_batch_tokens: int = 16384
    max_prompt_tokens: int = 2048
    max_new_tokens: int = 4096
    max_pixels: int = 0
    every: int = 0
    cue_recovery: bool = True
    gradient_checkpointing: bool = False
    offload_teacher: bool = False
    offload_optimizer: bool = False
    score_privilege: bool = False
    gpus: int = 1

    def reads_once(self) -> bool:
        """vision.py: both towers are one frozen tower, which reads each picture before the step."""
        return self.train != "all" and self.teacher == "self" and self.gpus == 1

    def views(self) -> int:
        """Pictures that wait for each one that the student sees: its own, and its teacher's."""
        return 2 if self.privilege.startswith("view") else 1

    def frozen(self) -> bool:
        """No weight of the backbone learns."""
        return self.train in ("cue", "lora")

    def shares(self) -> bool:
        """The teacher is the student, with its module and adapters off."""
        return self.frozen() and self.teacher == "self" and self.gpus == 1

    def picture(self, m, most: int) -> tuple[int, float, float]:
        """Of the pictures of a prompt: patches, bytes of their pixels, bytes of their features."""
        visual, b = self.visual(m, most), DTYPES[self.dtype]
        patches = visual * m.merge**2
        return patches, 4 * patches * m.pixels, visual * m.mergers * m.D * b

    def visual(self, m, most: int) -> int:
        """Visual tokens of a prompt, at most: the picture, or the limit of the prompt."""
        return min(self.max_prompt_tokens, (self.max_pixels or most) // m.side**2)


@dataclass
class Plan:
    """parameters: numbers by part. parts, peaks: bytes on one GPU, by part and by phase.
    host: bytes in CPU memory, by part (on a CPU these are in the peaks)."""
    parameters: dict
    parts: dict
    peaks: dict
    host: dict

    @property
    def peak(self) -> float:
        return max(self.peaks.values())


def plan(run: Run, student: dict, teacher: dict | None = None, most: int = 16_777_216) -> Plan:
    """A run's memory. student, teacher: config.json (None: the student's own); most: pixels."""
    size = sizes(run, student, teacher or student, most)
    peaks = {phase.__name__: phase(run, size) for phase in (evaluate, sample, teach, learn, update)}
    waiting = run.views() * size.prompts
    host = {"pictures of the batch": waiting * max(size.pixels, size.handed)}
    if run.offload_optimizer:
        host["optimizer"] = size.optimizer + size.exact_gradients
    if run.offload_teacher and not run.shares():      # and its hidden states, until they are needed
        host["teacher"] = size.teacher + size.responses * run.max_new_tokens * size.t.D * size.tb
    if run.device == "cpu":                           # one memory for all
        rest = sum(host.values()) - host["pictures of the batch"] + waiting * size.handed
        peaks = {k: v + rest for k, v in peaks.items()}
    else:
        peaks = {k: v * (1 + SLACK) + ALLOWANCE for k, v in peaks.items()}
    parts = {"student's weights": size.weights, "teacher's weights": size.teacher,
             "gradients": size.gradients, "optimizer": size.optimizer,
             "key/value cache": size.cache, "activations kept": size.kept,
             "logits, loss, backward": size.graph - size.kept}
    numbers = {"student": size.numbers.total, "of it vision": size.numbers.vision,
               "module": size.module,
               **({"adapters": size.added - size.module} if size.lora else {}),
               "trained": size.trained,
               "teacher": 0 if run.shares() else size.teacher_numbers.total}
    return Plan(numbers, parts, peaks, host)


def sizes(run: Run, student: dict, teacher: dict, most: int) -> SimpleNamespace:
    """What the phases add up: bytes on one GPU, and the numbers of prompts and tokens."""
    m, t, N, b = dimensions(student), dimensions(teacher), run.gpus, DTYPES[run.dtype]
    c, u = count(m), count(t)
    size = SimpleNamespace(m=m, t=t, numbers=c, teacher_numbers=u, b=b, most=most)
    size.tb = 4 if run.teacher == "ema" else b           # an average is kept in float32
    size.prompts = -(-run.batch_size // N)               # of one GPU, as all that follows
    size.responses = size.prompts * run.samples_per_prompt
    size.patches, size.pixels, features = run.picture(m, most)
    size.handed = features if run.reads_once() else size.pixels    # to the model, a prompt's
    # held all the time: weights in b bytes; masters and moments in float32
    size.module = module_size(m, run.every)[1] if run.cue_recovery else 0
    size.lora = adapters(m, run.lora_rank) if run.train == "lora" else 0        # of one layer
    size.added = size.module + m.layers * size.lora
    size.trained = size.added + {"all": c.total, "language": c.language}.get(run.train, 0)
    size.weights = b * (c.total + size.added) / N
    size.teacher = 0 if run.shares() else size.tb * u.total / N
    size.optimizer = (8 if b == 4 and not run.offload_optimizer else 12) * size.trained / N
    size.gradients, size.exact_gradients = b * size.trained / N, 4 * size.trained / N
    size.resting_teacher = 0 if run.offload_teacher else size.teacher
    size.always = size.weights + size.resting_teacher
    size.always += 0 if run.offload_optimizer else size.optimizer
    # a micro-batch: n tokens, in rows of `row`
    size.row = run.max_prompt_tokens + run.max_new_tokens
    size.n = min(max(run.micro_batch_tokens, size.row), size.responses * size.row)
    size.rows = max(1, min(size.n // run.max_prompt_tokens, size.responses))
    # gradients stay from micro-batch to micro-batch; of a single one they come as its graph goes
    size.earlier = size.gradients if size.responses * size.row > size.n else 0
    # FSDP2 gathers a layer while the one before computes; the root's (embedding, head, module,
    # adapters) stay gathered. An offloaded teacher's head stays for the whole step
    size.root, size.gathered = c.embedding + c.head + size.added, 0
    if N > 1:
        size.gathered = (b * size.root + size.tb * (u.embedding + u.head)
                      + 2 * max(b * c.layer, size.tb * u.layer))
    elif run.offload_teacher and not run.shares():
        size.gathered = size.tb * t.V * t.D
    size.cache, size.sampling = sampling(run, m, b, size.prompts, most)
    size.kept, size.graph = learning_with_loss(run, size)
    return size


def evaluate(run: Run, size) -> float:
    """Before the first step, without moments: the base answers, then the hinted teacher, unless it
    only scores. Each of several GPUs has the whole of the model that answers."""
    alone = replace(run, samples_per_prompt=1, train="all", sample_batch=min(64, run.sample_batch))
    resting = size.always - (0 if run.offload_optimizer else 8 * size.trained / run.gpus)

    def answering(m, b: int, numbers: int) -> float:
        _, generating = sampling(alone, m, b, GROUP * alone.sample_batch, size.most)
        return resting + generating + (b * numbers if run.gpus > 1 else 0)

    base = answering(size.m, size.b, size.numbers.total + size.module)
    if run.score_privilege:
        return base
    hinted = answering(size.t, size.tb, size.teacher_numbers.total)
    return max(base, hinted + size.teacher - size.resting_teacher)


def sample(run: Run, size) -> float:
    """Each of several GPUs has the whole student."""
    whole = size.b * (size.numbers.total + size.added) if run.gpus > 1 else 0
    return size.always + whole + size.sampling


def teach(run: Run, size) -> float:
    """The teacher reads a micro-batch. Offloaded, it reads all before the first gradient."""
    reading = size.n * layer_works(size.t, size.tb, size.row, run.attention, False)
    if not run.reads_once():
        block = block_works(size.t, size.tb, size.patches, run.attention)
        reading = max(reading, size.rows * size.patches * (block + size.tb * size.t.pixels))
    beside = size.teacher if run.offload_teacher else size.earlier
    return size.always + size.gathered + reading + size.rows * size.handed + beside


def learn(run: Run, size) -> float:
    """Forward and backward of a micro-batch. Gradients of several GPUs add up in float32."""
    largest = max(size.numbers.layer, size.added if run.frozen() else size.root)
    adding = (size.b + 4) * largest if run.gpus > 1 else 0
    return (size.always + size.gathered + adding + size.earlier + size.graph
            + size.rows * size.handed)


def update(run: Run, size) -> float:
    return size.always + (size.gradients if run.offload_optimizer else size.exact_gradients)


def sampling(run: Run, m, b: int, prompts: int, most: int) -> tuple[float, float]:
    """(bytes of the key/value cache, the most that sampling needs, the cache included)."""
    K, P = run.samples_per_prompt, run.max_prompt_tokens
    patches, pixels, features = run.picture(m, most)
    read = min(max(1, run.sample_batch // K), prompts)    # prompts; each is read once, for K rows
    token = 2 * m.layers * m.K * b                    # keys and values
    # the cache has room for the next ROOM tokens; when it is full, it is copied a layer at a time.
    # where prompts wait, it may have ROOM blank columns
    rooms = max(1, -(-(run.max_new_tokens - 1) // ROOM)) + (prompts > read)
    cache = read * K * (P + ROOM * rooms) * token
    see = patches * (block_works(m, b, patches, run.attention) + b * m.pixels) + pixels
    prefill = (P * (layer_works(m, b, P, run.attention, True) + token)
               + (features if run.reads_once() else pixels))
    decode = cache + cache / m.layers + read * K * m.V * (b + 24)     # logits, their distribution
    # they are read an eighth of the places at a time, beside the cache of the rest
    later = max(1, read // JOIN) if prompts > read else 0
    return cache, max(read * max(see, prefill), decode, cache + later * max(see, prefill))


def learning_with_loss(run: Run, size) -> tuple[float, float]:
    """(bytes kept for backward, the most that the student's forward and backward pass need)."""
    b, m = size.b, size.m
    kept, backward = learning(m, b, run, size.n, size.rows, size.patches, size.row)
    head = 0 if run.frozen() else m.V * m.D
    chunk = min(CHUNK, size.rows * run.max_new_tokens)
    logits = m.V * (chunk * 2 * b + ROWS * 16)        # of both models; of a few rows in float32
    rounded = b if b < 4 else 0                       # a bf16 head has both, in both places
    # the head's gradient is made in float32 and rounded; backward then walks through the layers
    # with the rounded one waiting (a tied embedding adds its own at the end)
    return kept, max(kept + logits + 4 * head, kept + (4 + rounded) * head, backward + b * head)


# ---------------------------------------------------------------------------- what makes it fit

def changes(run: Run) -> list[tuple]:
    """(setting, value) that saves memory without changing what is learnt, the cheapest first."""
    out = [("attention", "sdpa")] if run.attention == "eager" else []
    rows, tokens = run.sample_batch, run.micro_batch_tokens
    row = run.max_prompt_tokens + run.max_new_tokens
    while rows > 1:
        rows //= 2
        out.append(("sample_batch", rows))
    if run.gpus > 1 and run.teacher not in ("self", "ema") and not run.score_privilege:
        out.append(("score_privilege", True))
    if not run.gradient_checkpointing:
        out.append(("gradient_checkpointing", True))
    while tokens > row:
        tokens = max(tokens // 2, row)
        out.append(("micro_batch_tokens", tokens))
    if run.gpus == 1:                                 # distill.py offloads for one process only
        if not run.offload_teacher and run.teacher != "ema":
            out.append(("offload_teacher", True))
        if not run.offload_optimizer:
            out.append(("offload_optimizer", True))
    return out


def make_fit(run: Run, memory: float, *models) -> tuple[dict, Plan]:
    """Settings that bring the peak below `memory` bytes, as few as found; and the plan with them,
    which says whether it fits.

    Greedy: takes what lowers the peak until it fits, then gives back what was not needed.
    """
    taken, best, before = {}, plan(run, *models), math.inf
    while memory < best.peak < before:
        before = best.peak
        for name, value in changes(run):
            now = plan(replace(run, **{**taken, name: value}), *models)
            if best.peak > memory and now.peak < best.peak - 1e6:
                taken.pop(name, None)
                taken[name], best = value, now
    for name in list(taken):
        rest = {k: v for k, v in taken.items() if k != name}
        now = plan(replace(run, **rest), *models)
        if now.peak <= memory:
            taken, best = rest, now
    return taken, best


def flags(settings: dict) -> list[str]:
    """Settings as on the command line."""
    out = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            out.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            out.append(f"--{flag} {shlex.quote(str(value))}")
    return out


def command(gpus: int, asked, config) -> str:
    """The whole command line of a run: what differs from the defaults, or from what was asked."""
    start = "python" if gpus == 1 else f"torchrun --nproc-per-node {gpus}"
    said = {f.name: getattr(config, f.name) for f in fields(config)
            if f.name not in ("plan", "gpu_memory", "gpus", "name")
            and not getattr(config, f.name) == f.default == getattr(asked, f.name)}
    return " ".join([start, "distill.py", *flags(said)])


def read_models(config) -> tuple[tuple, str, str]:
    """(what plan() takes of both models, where the student's shape is from, and the teacher's)."""
    student, most, where = read_config(config.student)
    teacher, there = None, ""
    if config.teacher not in ("self", "ema"):
        teacher, _, there = read_config(config.teacher)
    return (student, teacher, most), where, there


def choose_sizes(config, memory: float) -> None:
    """Fill in sample_batch and micro_batch_tokens where they are 0: the most that `memory` GB hold.

    Up to 90 % of it, 128 rows and 32,768 tokens, beyond which a GPU is busy anyway. A bigger
    teacher on several GPUs only scores if no GPU has room for all of it. Without a memory to fit:
    Run's own.
    """
    free = [name for name in ("sample_batch", "micro_batch_tokens") if not getattr(config, name)]
    run = from_settings(config)
    if memory and free:
        models, _, _ = read_models(config)
        row = run.max_prompt_tokens + run.max_new_tokens
        sizes = {"micro_batch_tokens": (32768, 24576, 16384, 12288, 8192, row),
                 "sample_batch": (128, 96, 64, 48, 32, 24, 16, 12, 8, 4, 2, 1)}
        run = replace(run, **{name: sizes[name][-1] for name in free})
        scores = replace(run, score_privilege=True)
        if (run.gpus > 1 and run.teacher not in ("self", "ema")
                and plan(run, *models).peak > 0.9 * memory * GB >= plan(scores, *models).peak):
            run, config.score_privilege = scores, True
        for name in reversed(free):          # the micro-batch first: it decides the longest phase
            for size in sizes[name]:
                tried = replace(run, **{name: size})
                if size >= row * (name != "sample_batch") and (
                        plan(tried, *models).peak <= 0.9 * memory * GB):
                    run = tried
                    break
    config.sample_batch, config.micro_batch_tokens = run.sample_batch, run.micro_batch_tokens


def fitted(config, memory: float) -> tuple:
    """(the settings with sizes, and if need be flags, that fit in `memory` GB; what to say).
    """
    sized = replace(config)
    choose_sizes(sized, memory)
    run, (models, _, _) = from_settings(sized), read_models(sized)
    return verdict(run, plan(run, *models), memory, models, config, sized)


def report(config) -> str:
    """The table of `distill.py --plan`, for a distill.Config. Raises ValueError for a model whose
    shape cannot be had."""
    asked, config, memory = config, replace(config), config.gpu_memory
    choose_sizes(config, memory)
    run = from_settings(config)
    if run.gpus > 1 and (run.offload_teacher or run.offload_optimizer):
        raise ValueError("--offload-teacher and --offload-optimizer are for one GPU")
    models, where, there = read_models(config)
    student, _, most = models
    made = plan(run, *models)
    m = dimensions(student)
    lines = [f"student {config.student}: shape from {where}"]
    lines += [f"teacher {config.teacher}: shape from {there}"] if there else []
    lines += [f"train {run.train}, teacher {run.teacher}, {run.dtype}, attention {run.attention}, "
              f"{run.gpus} x {run.device}, prompts of at most {run.max_prompt_tokens} tokens "
              f"({run.visual(m, most)} visual), answers of {run.max_new_tokens}",
              *(["pictures count twice: the teacher has its own"] if run.views() > 1 else []), ""]
    lines += [f"  {name:18} {n / 1e6:10,.1f} M parameters" for name, n in made.parameters.items()]
    lines += ["", f"  {'on each ' + run.device:34} {'GB':>8}"]
    lines += [f"  {name:34} {size / GB:8.2f}" for name, size in made.parts.items()]
    lines += ["", f"  {'peak while the step does':34} {'GB':>8}"]
    lines += [f"  {name:34} {size / GB:8.2f}" + ("   <- the most" if size == made.peak else "")
              for name, size in made.peaks.items()]
    lines += ["", *(f"  {'CPU memory: ' + name:34} {size / GB:8.2f}"
                    for name, size in made.host.items())]
    if run.device != "cpu":
        lines.append(f"  (in the peaks: {ALLOWANCE / GB:.0f} GB for the CUDA context and "
                     f"{100 * SLACK:.0f} % for gaps, assumed, not measured)")
    if memory:
        lines += ["", verdict(run, made, memory, models, asked, config)[1]]
    return "\n".join(lines)


def verdict(run: Run, made: Plan, memory: float, models, asked, sized) -> tuple:
    """Settings that fit; and in words whether the run fits, with a command whose flags make it fit.

    asked: the settings as typed; sized: with the sizes that choose_sizes found.
    """
    size = f"{memory:.3g} GB" + (f" on each of {run.gpus} GPUs" if run.gpus > 1 else "")
    # sizes that are chosen here leave some room
    room = memory * GB * (1 if asked.sample_batch and asked.micro_batch_tokens else 0.9)
    if made.peak <= room:
        line = command(run.gpus, asked, sized)
        return sized, f"fits in {size}: {made.peak / GB:.1f} GB\n  {line}"
    changed, best = make_fit(run, room, *models)
    tried = " ".join(flags(changed)) or "any flag"
    text = f"does not fit in {size}: {made.peak / GB:.1f} GB. "
    if best.peak <= room:
        sized = replace(asked, **changed)             # with these flags there may be room for more
        choose_sizes(sized, memory)
        best = plan(from_settings(sized), *models)
        host = ", ".join(f"{v / GB:.0f} GB of CPU memory for {k}" for k, v in best.host.items())
        return sized, (f"{text}It does, in {best.peak / GB:.1f} GB, with {tried} ({host}):"
                       f"\n  {command(run.gpus, asked, sized)}")
    phase = max(best.peaks, key=best.peaks.get)
    text += f"Nor with {tried}: {best.peak / GB:.1f} GB, in \"{phase}\"."
    less = [train for train in ("language", "cue") if train != run.train and run.train != "cue"
            and make_fit(replace(run, train=train), room, *models)[1].peak <= room]
    return sized, text + (f" --train {' or --train '.join(less)} would." if less else
                          " A smaller model, shorter --max-new-tokens or more GPUs would.")


def from_settings(config) -> Run:
    """The settings of distill.Config that the plan needs, its defaults filled in."""
    values = {name: getattr(config, name) for name in Run.__dataclass_fields__
              if hasattr(config, name)}
    values["device"] = config.device or "cuda"
    values["gpus"] = config.gpus or int(os.environ.get("WORLD_SIZE", 1))
    values["dtype"] = config.dtype or ("float32" if config.device == "cpu" else "bfloat16")
    values["sample_batch"] = config.sample_batch or Run.sample_batch
    values["micro_batch_tokens"] = config.micro_batch_tokens or Run.micro_batch_tokens
    return Run(**values)
