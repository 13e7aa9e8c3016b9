"""model.py - Qwen3-VL in and out: load a checkpoint, build prompts id by id, batch them.

The idea.  All that the method feeds to a Qwen3-VL is made here, by hand, from the small JSON
files of the checkpoint's folder. A prompt is a list of token ids and, for each picture, a stack of
flattened patches:

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n
    <|vision_start|><|image_pad|> x n<|vision_end|>question[\\ninstruction]
    [\\n[Hint]: hint]<|im_end|>\\n
    <|im_start|>assistant\\n[<think>\\n, where the checkpoint's own chat template ends so]

In:  a record {"images": [paths or PIL images], "question": str}, perhaps with "instruction" (how
     to answer), and a hint for the teacher. A video is {"video": [frames], "fps": 2.0}, or with
     "seconds", the time of each frame.
Out: Prompt(ids, pixels, grids); batch() pads several into the keyword arguments of the model.

The one equation.  A picture of H x W pixels costs  n = (H / 2P) * (W / 2P)  visual tokens (P =
patch size, 2 = merge); H and W are first rounded to multiples of 2P inside the pixel budget.

Use it alone:  model, processor = load("Qwen/Qwen3-VL-2B-Instruct"); needs torch, transformers,
tokenizers, safetensors, jinja2, numpy and pillow, and neither torchvision nor AutoProcessor.
Processor(find_folder(path, weights=False)) finds what is wrong before weights are fetched.

What differs from the class's own processor, and why:
1) Text from a record can never become a control token. The stock tokenizer turns the string
   "<|im_end|>" inside a question into the id that ends the turn; here it stays plain text.
2) M-RoPE positions are computed once, here, and passed to the model. Left to itself the model keeps
   them as hidden state between calls (`rope_deltas`), which a teacher's forward pass overwrites.
3) A checkpoint's chat template only makes one prompt, to be compared with ours: what it puts behind
   the assistant's header is taken over, and any other difference is refused.
4) EXIF rotation, transparency (on white), 16-bit, grey, palette and CMYK pictures all become the
   RGB picture that a viewer would show.
Left out: decoding a video file (give frames), tool calls and multi-turn chats.
"""
from __future__ import annotations

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image, ImageOps
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch.nn.utils.rnn import pad_sequence

SYSTEM = "You are a helpful assistant."  # PAPER table 4
INSTRUCTION = "Reason step by step, then put the final answer in \\boxed{}."    # to be graded
PIXELS = 56 * 56, 28 * 28 * 1280     # fewest and most of a picture where a checkpoint names none
VIDEO_PIXELS = 25_165_824    # of all frames of a video together, the checkpoints' own limit
BIG = 16_000_000             # pictures above so many pixels are decoded one at a time
DECODER = ThreadPoolExecutor(1)        # for pictures above BIG
TINY = Path(__file__).resolve().parent / "data" / "tiny-qwen3-vl"
CUE_FILE = "cue_recovery.safetensors"
ARCHITECTURES = {"qwen3_vl": "Qwen3VLForConditionalGeneration",
                 "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration"}

# Dimension letters: B rows, L tokens, P patch size, N visual tokens.


# ---------------------------------------------------------------------------- load

def find_folder(path, weights: bool = True) -> Path:
    """The local folder of a checkpoint: a folder as it is, else a name fetched from the hub.

    weights=False fetches only what is small: settings, tokenizer, the module's file. Raises
    ConnectionError.
    """
    if Path(path).is_dir():
        return Path(path)
    old = Path(f"{Path(path)}.old")
    if old.is_dir():        # save() was killed between its two renames, so the old one is the last
        if weights:         # said once: load() looks for the small files first
            print(f"{path} is not there, reading {old}, which a killed save left behind")
        return old
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", str(path)):
        default = f"; the tiny default is {TINY}" if Path(path) != TINY else ""
        raise FileNotFoundError(f"{path} is not a folder (and not a hub name like "
                                f"Qwen/Qwen3-VL-2B-Instruct){default}")
    from huggingface_hub import snapshot_download
    patterns = ["*.json", "*.jinja", "*.txt", "*.safetensors" if weights else CUE_FILE]
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # offline, no such name, no permission: the hub raises many kinds
        reason = shorten(str(error), 160, placeholder=" ...")
        raise ConnectionError(f"cannot get {path} from the hub ({type(error).__name__}: {reason}); "
                              f"give a local folder; the tiny default is {TINY}") from None


def load(path, dtype=None, device=None, *, min_pixels=None, max_pixels=None, attention="sdpa",
         cue: bool = True):
    """A checkpoint folder or hub name -> (model of transformers in eval mode, Processor).

    device: default cuda if there is one, else cpu; "meta" for shapes without numbers. dtype:
    default float32 on a CPU, else bfloat16. A module in the folder (cue_recovery.safetensors) is
    attached, unless cue is False: a teacher has none. Raises for another architecture, and for
    weights that are not exactly the model's: one missing, one too many, one of another shape.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or ("float32" if device.type == "cpu" else "bfloat16")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    # cuDNN's attention plans anew for each length it meets, so at every token of an answer: on an
    # H200 a 2B's decoding step took 61 ms with it, 16 once its lengths had been met
    torch.backends.cuda.enable_cudnn_sdp(False)
    folder = find_folder(path, weights=False)
    processor = Processor(folder, min_pixels, max_pixels)       # before any weight is fetched
    import transformers         # late: a refusal need not wait for it
    kind = getattr(transformers, ARCHITECTURES[model_config(folder)["model_type"]])
    if device.type == "meta":
        with device:
            model = kind._from_config(kind.config_class.from_pretrained(folder), dtype=dtype,
                                      attn_implementation=attention)
    else:
        folder = find_folder(path)
        model = _read_weights(kind, folder, device, dtype, attention)
    model.eval()
    if cue and (folder / CUE_FILE).exists():
        try:
            import cue_recovery
        except ImportError as error:
            raise ImportError(f"{folder} has {CUE_FILE}: put cue_recovery.py beside model.py, or "
                              "load with cue=False") from error
        cue_recovery.load(model, folder / CUE_FILE)
    return model, processor


def last_hidden_state(model, batch: dict) -> torch.Tensor:
    """(B, W, D) hidden states of a whole batch, without a cache and without logits."""
    return model.model(**batch, use_cache=False).last_hidden_state


def model_config(folder) -> dict:
    """config.json of a checkpoint that load() can read. Raises ValueError for another model."""
    config = _read_json(Path(folder) / "config.json")
    if config.get("model_type") not in ARCHITECTURES:
        raise ValueError(f"{folder}: model_type is {config.get('model_type')!r}, this project "
                         f"handles {' and '.join(map(repr, ARCHITECTURES))}")
    if absent := {"text_config", "vision_config"} - config.keys():
        raise ValueError(f"{folder}: config.json has no {min(absent)}")
    return config


def _read_weights(kind, folder: Path, device: torch.device, dtype: torch.dtype, attention: str):
    """The model, of class `kind`, of a folder that has exactly its weights, on `device`."""
    names, index = {"model.safetensors"}, folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        names = set(_read_json(index).get("weight_map", {}).values())
    absent = sorted(name for name in names if not (folder / name).exists())
    if absent or not names:
        raise FileNotFoundError(f"{folder}: {len(absent)} of {len(names)} weight files are "
                                f"missing: {absent[:5]}")
    config = model_config(folder)
    # quantised weights go straight to their device: their kernels are chosen for it
    quantised = config.get("quantization_config") or config["text_config"].get(
        "quantization_config")
    there = {"device_map": {"": device}} if quantised else {}
    try:
        # ignore: a wrong shape is to be reported below, by name, with the others
        model, info = kind.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, output_loading_info=True,
            local_files_only=True, use_safetensors=True, ignore_mismatched_sizes=True, **there)
    except SafetensorError as error:
        raise ValueError(f"{folder}: damaged weights, perhaps an unfinished download: "
                         f"{error}") from None
    # transformers fills what is missing with random numbers and only warns
    wrong = {"of another shape": [f"{name} {tuple(found)}, expected {tuple(expected)}"
                                  for name, found, expected in info["mismatched_keys"]],
             "missing": info["missing_keys"], "unknown to this class": info["unexpected_keys"]}
    for what, names in wrong.items():
        if names:
            raise ValueError(f"{folder}: {len(names)} weights are {what}: {sorted(names)[:5]}")
    return model if there else model.to(device)


def _answer_prefix(folder: Path) -> str:
    """What the chat template puts behind the assistant's header: "", or "<think>\\n".

    "" if there is no template. ValueError for one that makes another prompt than ours.
    """
    path, template = folder / "chat_template.jinja", None
    if path.exists():
        template = path.read_text(encoding="utf-8", errors="replace")
    for other in ("chat_template.json", "tokenizer_config.json"):   # in transformers' order
        if not template:
            path = folder / other
            template = _read_json(path, missing={}).get("chat_template")
        if isinstance(template, list):      # several, each with a name
            template = {one.get("name"): one.get("template") for one in template}.get("default")
    if not template:
        return ""
    ours = (f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            "<|image_pad|><|vision_end|>Why?<|im_end|>\n<|im_start|>assistant\n")
    asked = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    # transformers' settings, and its own tag, which marks the answers; torch brings jinja2 along
    template = re.sub(r"\{%-? *(end)?generation *-?%\}", "", template)
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=["jinja2.ext.loopcontrols"])
    try:
        theirs = jinja.from_string(template).render(add_generation_prompt=True, messages=[
            {"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}])
    except Exception as error:              # a template may raise anything
        raise ValueError(f"{path}: this chat template cannot be rendered: "
                         f"{type(error).__name__}: {error}") from None
    if not theirs.startswith(ours):
        raise ValueError(f"{path}: this chat template makes {theirs[:300]!r} of a question, "
                         f"this project {ours!r}. If the model knows ours, remove the template")
    return theirs.removeprefix(ours)


def _read_json(path: Path, missing=None) -> dict:
    if not path.exists():
        if missing is not None:
            return missing
        raise FileNotFoundError(f"{path.parent} is not a Qwen3-VL folder: {path.name} is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


# ---------------------------------------------------------------------------- prompts

@dataclass
class Prompt:
    """What one record becomes."""
    ids: list[int]
    pixels: torch.Tensor | None = None                                  # (patches, features)
    grids: list[tuple[int, int, int]] = field(default_factory=list)     # (t, h, w) a picture
    video: torch.Tensor | None = None
    video_grids: list[tuple[int, int, int]] = field(default_factory=list)    # t: pairs of frames


class Processor:
    """Records to Prompts, Prompts to model arguments, ids to text. Reads `folder` once.

    stop_ids    the generation config's eos ids and <|im_end|>; two models may disagree here
    banned_ids  control tokens and unused embedding rows, never to be sampled
    sampling    these and the pad id, as the keyword arguments that rollout.sample takes
    vocab       token -> id, to compare two models
    answer_prefix  what the prompt ends in behind the assistant's header: "", or "<think>\\n"
    """

    def __init__(self, folder, min_pixels: int | None = None, max_pixels: int | None = None):
        self.folder = Path(folder).absolute()    # save() copies from here, wherever it is called
        config = model_config(self.folder)
        self._read_picture_settings(config["vision_config"], min_pixels, max_pixels)
        self._read_tokens(config)
        self.answer_prefix = _answer_prefix(self.folder)

    def _read_picture_settings(self, vision: dict, min_pixels, max_pixels) -> None:
        # transformers 5 has them in processor_config.json, and looks there first
        pictures = _read_json(self.folder / "processor_config.json", missing={}).get(
            "image_processor")
        if pictures is None:
            pictures = _read_json(self.folder / "preprocessor_config.json")
        # old names beside the new, or inside "size"; height and width as the largest picture
        size = {**(pictures.get("size") or {}), **{k: v for k, v in pictures.items() if v}}
        area = (size.get("height") or 0) * (size.get("width") or 0)
        most = size.get("max_pixels") or size.get("longest_edge") or area or PIXELS[1]
        least = size.get("min_pixels") or size.get("shortest_edge") or min(PIXELS[0], most)
        self.patch = pictures.get("patch_size", vision["patch_size"])
        self.merge = pictures.get("merge_size", vision["spatial_merge_size"])
        self.temporal = pictures.get("temporal_patch_size", 2)
        self.min_pixels, self.max_pixels = min_pixels or least, max_pixels or most
        self.video_pixels = VIDEO_PIXELS
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"--min-pixels {self.min_pixels} is above --max-pixels "
                             f"{self.max_pixels}")
        for key in ("image_mean", "image_std"):
            if any(abs(value - 0.5) > 1e-6 for value in pictures.get(key, [0.5])):
                raise ValueError(f"{self.folder}: {key} is {pictures[key]}, Qwen3-VL uses 0.5")

    def _read_tokens(self, config: dict) -> None:
        path = self.folder / "tokenizer.json"
        stripped = _read_json(path)
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:          # its only kind
            raise ValueError(f"{path}: not a tokenizer: {error}") from None
        self.vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        self.control = {token["content"]: token["id"] for token in stripped["added_tokens"]}
        # The same BPE without its added tokens: whatever a data file says, it stays plain text.
        stripped["added_tokens"], stripped["post_processor"] = [], None
        self._plain = Tokenizer.from_str(json.dumps(stripped))

        self.image_id, self.video_id = config["image_token_id"], config["video_token_id"]
        for name, expected in (("<|image_pad|>", self.image_id), ("<|video_pad|>", self.video_id)):
            if self.control.get(name) != expected:
                raise ValueError(f"{self.folder}: config.json says {name} is {expected}, "
                                 f"tokenizer.json says {self.control.get(name)}")
        generation = _read_json(self.folder / "generation_config.json", missing={})
        eos, pad = generation.get("eos_token_id"), generation.get("pad_token_id")
        eos = [eos] if isinstance(eos, int) else eos or []
        self.stop_ids = {self.control["<|im_end|>"], *eos}
        self.pad_id = self.control["<|endoftext|>"] if pad is None else pad
        # Rows of the embedding beyond the tokenizer exist only to round its size; and a sampled
        # <|image_pad|> would make the scoring pass look for a picture that is not there.
        unused = set(range(config["text_config"]["vocab_size"])) - set(self.vocab.values())
        marks = {i for name, i in self.control.items() if name.startswith("<|")}
        self.banned_ids = sorted((unused | marks) - self.stop_ids)
        self.sampling = {"stop_ids": self.stop_ids, "banned_ids": self.banned_ids,
                         "pad_id": self.pad_id}

    # -- one record to one prompt

    def prompt(self, record: dict, hint: str | None = None, pictures_from: Prompt | None = None,
               decode: bool = True) -> Prompt:
        """One record as a Prompt, in Qwen3-VL's chat format: pictures, question, then the hint.

        hint: what the teacher is told, in a line "[Hint]: ..." behind the question. The prompt ends
        in the same header, so student and teacher answer from one place.
        pictures_from: a prompt of the same record, whose pixels are taken over. decode=False reads
        only the pictures' headers: the ids, without pixels.
        Raises ValueError naming the record for a picture that cannot be read.
        """
        if pictures_from is not None:
            return replace(pictures_from, ids=self._ids(record, hint, pictures_from.grids))
        images, where = record.get("images", []), f"record {record.get('id', '?')}"
        if not isinstance(images, (list, tuple)):
            raise ValueError(f"{where}: images must be a list, not {images!r}")
        if "question" not in record:
            raise ValueError(f"{where} has no question")
        grids = [self._grid(source, record) for source in images]
        prompt = Prompt(self._ids(record, hint, grids), grids=grids)
        if not decode:
            return prompt
        if images:
            prompt.pixels = torch.cat([self._patches([source], grid, record)
                                       for source, grid in zip(images, grids)])
        if record.get("video"):
            grid, _ = self._moments(record)
            prompt.video, prompt.video_grids = self._patches(record["video"], grid, record), [grid]
        return prompt

    def length(self, record: dict, hint: str | None = None) -> int:
        """Tokens that prompt() will give, without decoding the pictures."""
        return len(self.prompt(record, hint, decode=False).ids)

    def _ids(self, record, hint, grids) -> list[int]:
        question = record["question"]
        if record.get("instruction"):
            question += "\n" + record["instruction"]
        if hint is not None:
            question += f"\n[Hint]: {hint}"
        shown = [("", self.image_id, grid) for grid in grids]
        if record.get("video"):     # a row of stamped moments, each like a picture
            grid, times = self._moments(record)
            shown += [(f"<{time:.1f} seconds>", self.video_id, grid) for time in times]
        mark, vision = self.control, []
        for stamp, pad, (_, gh, gw) in shown:
            vision += [stamp, mark["<|vision_start|>"], *[pad] * (gh * gw // self.merge**2),
                       mark["<|vision_end|>"]]
        start, end = mark["<|im_start|>"], mark["<|im_end|>"]
        prefix = [mark.get(part, part) for part in re.split("(<[^<>]*>)", self.answer_prefix)]
        return self.encode(start, f"system\n{SYSTEM}", end, "\n",
                           start, "user\n", *vision, question, end, "\n",
                           start, "assistant\n", *prefix)

    def encode(self, *parts: str | int) -> list[int]:
        """Ids of texts, in which control strings stay text; ids among them stay as they are."""
        ids = []
        for plain, run in groupby(parts, key=lambda part: isinstance(part, str)):
            # BPE may merge across two strings, so join them first
            ids += self._plain.encode("".join(run), add_special_tokens=False).ids if plain else run
        return ids

    def decode(self, ids) -> str:
        """Text of a response; stop and padding ids are left out."""
        if isinstance(ids, torch.Tensor):
            ids = ids.tolist()      # one copy from a GPU; reading them one by one waits for each
        skip = self.stop_ids | {self.pad_id}
        return self.tokenizer.decode([i for i in ids if i not in skip], skip_special_tokens=False)

    # -- pictures and videos

    def _grid(self, source, record, budget=math.inf) -> tuple[int, int, int]:
        """The grid of patches that a picture is resized to."""
        most = min(self.max_pixels, budget)
        least = min(self.min_pixels, most)
        height, width = read_picture(source, record, "read", lambda image: fit(
            # EXIF orientations 5 to 8: it lies on its side
            *(image.size if image.getexif().get(0x0112) in range(5, 9) else image.size[::-1]),
            self.patch * self.merge, least, most))
        return 1, height // self.patch, width // self.patch

    def _patches(self, sources: list, grid: tuple[int, int, int], record) -> torch.Tensor:
        """(t * gh * gw, 3 * temporal * P * P) float32 in [-1, 1], of one picture or one video.

        Patches of one merge x merge block stand together, since the vision tower folds each block
        into one visual token, and `temporal` frames share a patch: a missing last frame (a still
        picture has only one) is the frame before it again.
        """
        (t, gh, gw), P, m = grid, self.patch, self.merge
        size = gw * P, gh * P
        frames = [read_picture(source, record, "decode", lambda image: np.asarray(
            to_rgb(image).resize(size, Image.Resampling.BICUBIC))) for source in sources]
        frames += frames[-1:] * (-len(frames) % self.temporal)
        x = np.stack(frames).reshape(t, self.temporal, gh // m, m, P, gw // m, m, P, 3)
        # to: t, block row, block column, row, column, 3, temporal, P, P
        x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        # bytes are put in order first: floats are four times as much to move
        x = np.ascontiguousarray(x).reshape(t * gh * gw, -1).astype(np.float32) / 127.5 - 1.0
        return torch.from_numpy(x)

    def _moments(self, record) -> tuple[tuple[int, int, int], list[float]]:
        """Grid of a record's video, and the time of each of its moments (pairs of frames)."""
        frames, where = record["video"], f"record {record.get('id', '?')}"
        if isinstance(frames, str):
            raise ValueError(f"{where}: video {frames!r} is a file; give a list of its frames")
        if not record.get("seconds") and not record.get("fps"):
            raise ValueError(f"{where}: a video needs \"fps\" or \"seconds\": without times of its "
                             "frames the model is told wrong ones")
        times = list(record.get("seconds") or [i / record["fps"] for i in range(len(frames))])
        if len(times) != len(frames):
            raise ValueError(f"{where}: {len(frames)} frames but {len(times)} times in \"seconds\"")
        times += times[-1:] * (-len(times) % self.temporal)
        # All moments share the size of the first frame; the whole film has a budget of its own.
        _, gh, gw = self._grid(frames[0], record, self.video_pixels // len(times))
        moments = zip(times[::self.temporal], times[self.temporal - 1::self.temporal])
        moments = [(first + last) / 2 for first, last in moments]
        return (len(moments), gh, gw), moments

    # -- many prompts to one batch

    def batch(self, prompts: list[Prompt], side: str = "left", device=None) -> dict:
        """Pad prompts into the keyword arguments of the model: `model(**processor.batch(prompts))`.

        input_ids, attention_mask, mm_token_type_ids (B, L) and position_ids (3, B, L); with
        pictures also pixel_values (patches, features) and image_grid_thw (pictures, 3). Padded
        left, every prompt ends in the last column, where sampling reads its first logit.
        """
        if side not in ("left", "right"):
            raise ValueError(f"side is {side!r}, expected 'left' or 'right'")
        rows = [torch.tensor(prompt.ids) for prompt in prompts]
        places = [rope_positions(p, self.image_id, self.merge, self.video_id).T for p in prompts]
        ids = pad_sequence(rows, True, self.pad_id, side)                              # (B, L)
        mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, side)
        positions = pad_sequence(places, True, 0, side).permute(2, 0, 1).contiguous()  # (3, B, L)
        out = {"input_ids": ids, "attention_mask": mask, "position_ids": positions,
               "mm_token_type_ids": (ids == self.image_id).int() + 2 * (ids == self.video_id).int()}
        pictures, videos = [p for p in prompts if p.grids], [p for p in prompts if p.video_grids]
        if pictures:
            out["pixel_values"] = torch.cat([p.pixels for p in pictures])
            out["image_grid_thw"] = torch.tensor([grid for p in pictures for grid in p.grids])
        if videos:
            out["pixel_values_videos"] = torch.cat([p.video for p in videos])
            out["video_grid_thw"] = torch.tensor([g for p in videos for g in p.video_grids])
        return {name: tensor.to(device) for name, tensor in out.items()}

    def in_turn(self, prompts, device=None):
        """A function that makes a batch of the next n of `prompts`, any iterable, or None."""
        waiting = iter(prompts)
        return lambda n: self.batch(few, device=device) if (few := [*islice(waiting, n)]) else None


# ---------------------------------------------------------------------------- pictures

def read_picture(source, record: dict, what: str, call):
    """call(picture), of a PIL image or a path. Raises ValueError("record ID: cannot WHAT picture").

    Large ones all go to one thread: 108 megapixels take 1.3 GB while they are decoded, and a
    thread keeps what it once had.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        large = image.width * image.height > BIG
        return DECODER.submit(call, image).result() if large else call(image)
    except Exception as error:      # Pillow's readers raise many kinds, AVIF's RuntimeError
        raise ValueError(f"record {record.get('id', '?')}: cannot {what} picture {source}: "
                         f"{error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The RGB picture a viewer would show: upright, on white, 16-bit scaled instead of clipped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own convert("RGB") clips everything above 255 to white.
        grey = np.asarray(image, dtype=np.float32)
        clear = grey == image.info.get("transparency", -1)      # PNG: one grey may be transparent
        deep = image.mode.startswith("I;16") or grey.max() > 255    # 16 bits even where it is dark
        grey = grey / (65535.0 if deep else 255.0) * 255.0
        grey[clear] = 255
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def fit(height: int, width: int, multiple: int, min_pixels: int,
        max_pixels: int) -> tuple[int, int]:
    """Size after resizing: multiples of `multiple`, about the same shape, inside the pixel budget.

    >>> fit(100, 200, 32, 32 * 32, 4096 * 4096)
    (96, 192)
    """
    if max(height, width) / min(height, width) > 200:
        raise ValueError(f"picture of {width} x {height} pixels: one side is more than 200 times "
                         "the other, Qwen3-VL cannot place it")
    new_height = round(height / multiple) * multiple
    new_width = round(width / multiple) * multiple
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        # max(): rounding down a very thin picture would give a side of 0
        new_height = max(multiple, math.floor(height / shrink / multiple) * multiple)
        new_width = max(multiple, math.floor(width / shrink / multiple) * multiple)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / multiple) * multiple
        new_width = math.ceil(width * grow / multiple) * multiple
    return new_height, new_width


# ---------------------------------------------------------------------------- batches

def rope_positions(prompt: Prompt, image_id: int, merge: int, video_id: int = -1) -> torch.Tensor:
    """(3, L) multimodal rotary positions (M-RoPE): time, row and column of every token.

    Text counts on all three axes alike. A picture's tokens share one time and spread over rows and
    columns from there; the text after it goes on behind the largest of them. Three words, a picture
    of 2 x 3 visual tokens, one word:

    >>> p = Prompt([5, 6, 7] + [9] * 6 + [8], None, [(1, 4, 6)])
    >>> rope_positions(p, image_id=9, merge=2).tolist()
    [[0, 1, 2, 3, 3, 3, 3, 3, 3, 6], [0, 1, 2, 3, 3, 3, 4, 4, 4, 6], [0, 1, 2, 3, 4, 5, 3, 4, 5, 6]]
    """
    # each moment of a video stands between marks of its own, so it is placed like a picture
    moments = [(1, h, w) for t, h, w in prompt.video_grids for _ in range(t)]
    grids = {image_id: list(prompt.grids), video_id: moments}
    pieces, here = [], 0
    for kind, run in groupby(prompt.ids, key=lambda i: i if i in grids else None):
        if kind is None:
            n = sum(1 for _ in run)
            pieces.append((torch.arange(n) + here).expand(3, -1))
            here += n
        else:
            t, h, w = grids[kind].pop(0)
            t, h, w = torch.arange(t), torch.arange(h // merge), torch.arange(w // merge)
            pieces.append(torch.cartesian_prod(t, h, w).T + here)
            here += max(len(t), len(h), len(w))
    return torch.cat(pieces, dim=1)
