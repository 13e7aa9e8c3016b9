"""model.py - Qwen3-VL in and out: load a checkpoint, build prompts id by id, batch them, save.

The idea.  Everything the method feeds to a Qwen3-VL is made here, by hand, from four files of the
checkpoint's folder: config.json, tokenizer.json, preprocessor_config.json, generation_config.json.
A prompt is a list of token ids and, for each picture, a stack of flattened patches:

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n
    <|vision_start|><|image_pad|> x n<|vision_end|>question[\\n[Hint]: hint]<|im_end|>\\n
    <|im_start|>assistant\\n

In:  a record {"images": [paths or PIL images], "question": str} and, for the teacher, a hint; a
     video is {"video": [frames], "fps": 2.0}, or with "seconds", the time of each frame.
Out: Prompt(ids, pixels, grids); batch() pads several into the keyword arguments of the model.

The one equation.  A picture of H x W pixels costs  n = (H / 2P) * (W / 2P)  visual tokens (P =
patch size, 2 = merge); H and W are first rounded to multiples of 2P inside the pixel budget.

Use it alone:  model, processor = load("Qwen/Qwen3-VL-2B-Instruct"); needs torch, transformers,
tokenizers, safetensors, numpy and pillow. No torchvision, no AutoProcessor, no Jinja.

What differs from the class's own processor, and why:
1) Text from a record can never become a control token. The stock tokenizer turns the string
   "<|im_end|>" inside a question into the id that ends the turn; here it stays plain text.
2) M-RoPE positions are computed once, here, and passed to the model. Left to itself the model keeps
   them as hidden state between calls (`rope_deltas`), which a teacher's forward pass overwrites.
3) EXIF rotation, transparency (on white), 16-bit, grey, palette and CMYK pictures all become the
   RGB picture that a viewer would show.
Left out: decoding a video file (give frames), tool calls and multi-turn chats.
"""
from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from tokenizers import Tokenizer

SYSTEM = "You are a helpful assistant."  # PAPER table 4
VIDEO_PIXELS = 25_165_824    # of all frames of a video together, the checkpoints' own limit
TINY = Path(__file__).resolve().parent / "data" / "tiny-qwen3-vl"
CUE_FILE = "cue_recovery.safetensors"
PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                   "chat_template.json", "preprocessor_config.json", "generation_config.json",
                   "vocab.json", "merges.txt", "video_preprocessor_config.json")

# Dimension letters: B rows, L tokens, P patch size, N visual tokens.


# ---------------------------------------------------------------------------- pictures

def to_rgb(image: Image.Image) -> Image.Image:
    """The RGB picture a viewer would show: upright, on white, 16-bit scaled instead of clipped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own convert("RGB") clips everything above 255 to white.
        grey = np.asarray(image, dtype=np.float32)
        deep = image.mode.startswith("I;16") or grey.max() > 255    # 16 bits even where it is dark
        grey = grey / (65535.0 if deep else 255.0) * 255.0
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


def patchify(frames: np.ndarray, patch: int, merge: int,
             temporal: int) -> tuple[torch.Tensor, tuple]:
    """(F, H, W, 3) uint8 -> (t * gh * gw, 3 * temporal * P * P) float32 in [-1, 1], (t, gh, gw).

    Patches of one merge x merge block stand together, since the vision tower folds each block into
    one visual token, and `temporal` frames share a patch: a missing last frame (a still picture has
    only one) is the frame before it again.
    """
    short = -len(frames) % temporal
    frames = np.concatenate([frames, np.repeat(frames[-1:], short, axis=0)]) if short else frames
    t, gh, gw = len(frames) // temporal, frames.shape[1] // patch, frames.shape[2] // patch
    x = frames.reshape(t, temporal, gh // merge, merge, patch, gw // merge, merge, patch, 3)
    # to: t, block row, block column, row, column, 3, temporal, P, P
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    # bytes are put in order first: floats are four times as much to move
    x = np.ascontiguousarray(x).reshape(t * gh * gw, -1).astype(np.float32) / 127.5 - 1.0
    return torch.from_numpy(x), (t, gh, gw)


# ---------------------------------------------------------------------------- prompts

@dataclass
class Prompt:
    """One prompt. ids: token ids; pixels: (patches, features) or None; grids: (t, h, w) a picture.

    video, video_grids: the same of the videos, whose t counts pairs of frames.
    """
    ids: list[int]
    pixels: torch.Tensor | None = None
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    video: torch.Tensor | None = None
    video_grids: list[tuple[int, int, int]] = field(default_factory=list)


class Processor:
    """Records to Prompts, Prompts to model arguments, ids to text. Reads `folder` once.

    Attributes a training loop needs:
      stop_ids    set: the generation config's eos ids and <|im_end|>; two models may disagree here
      banned_ids  list: control tokens and unused embedding rows, never to be sampled
      sampling    these and the pad id, as the keyword arguments that rollout.sample takes
      pad_id, image_id, video_id, vocab (token -> id, to compare two models)
    """

    def __init__(self, folder, min_pixels: int | None = None, max_pixels: int | None = None):
        self.folder = Path(folder).absolute()    # save() copies from here, wherever it is called
        config = _read_json(self.folder / "config.json")
        generation = _read_json(self.folder / "generation_config.json", missing={})
        pictures = _read_json(self.folder / "preprocessor_config.json")
        size = pictures.get("size") or {}
        self.patch = pictures.get("patch_size", config["vision_config"]["patch_size"])
        self.merge = pictures.get("merge_size", config["vision_config"]["spatial_merge_size"])
        self.temporal = pictures.get("temporal_patch_size", 2)
        self.min_pixels = min_pixels or size.get("shortest_edge") or pictures["min_pixels"]
        self.max_pixels = max_pixels or size.get("longest_edge") or pictures["max_pixels"]
        self.video_pixels = VIDEO_PIXELS
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"--min-pixels {self.min_pixels} is above --max-pixels "
                             f"{self.max_pixels}")
        for key in ("image_mean", "image_std"):
            if any(abs(value - 0.5) > 1e-6 for value in pictures.get(key, [0.5])):
                raise ValueError(f"{self.folder}: {key} is {pictures[key]}, Qwen3-VL uses 0.5")

        stripped = _read_json(self.folder / "tokenizer.json")
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        # The same BPE without its added tokens: whatever a data file says, it stays plain text.
        added = {token["content"]: token["id"] for token in stripped["added_tokens"]}
        stripped["added_tokens"] = []
        stripped["post_processor"] = None
        self._plain = Tokenizer.from_str(json.dumps(stripped))
        self.vocab = self.tokenizer.get_vocab(with_added_tokens=True)

        self.image_id, self.video_id = config["image_token_id"], config["video_token_id"]
        for name, expected in (("<|image_pad|>", self.image_id), ("<|video_pad|>", self.video_id)):
            if added.get(name) != expected:
                raise ValueError(f"{self.folder}: config.json says {name} is {expected}, "
                                 f"tokenizer.json says {added.get(name)}")
        self.control = added
        eos = generation.get("eos_token_id")
        self.stop_ids = {added["<|im_end|>"], *([eos] if isinstance(eos, int) else eos or [])}
        pad = generation.get("pad_token_id")
        self.pad_id = added["<|endoftext|>"] if pad is None else pad
        # Rows of the embedding beyond the tokenizer exist only to round its size; and a sampled
        # <|image_pad|> would make the scoring pass look for a picture that is not there.
        unused = set(range(config["text_config"]["vocab_size"])) - set(self.vocab.values())
        control = {i for name, i in added.items() if name.startswith("<|")}
        self.banned_ids = sorted((unused | control) - self.stop_ids)
        self.sampling = {"stop_ids": self.stop_ids, "banned_ids": self.banned_ids,
                         "pad_id": self.pad_id}

    # -- one record

    def prompt(self, record: dict, hint: str | None = None, seen: Prompt | None = None) -> Prompt:
        """One record as a Prompt, in Qwen3-VL's chat format: pictures, question, then the hint.

        With `hint` (the teacher's view) a line "[Hint]: ..." follows the question; the end of the
        prompt, the assistant header, is the same, so student and teacher answer from one place.
        seen: a prompt of the same record, to take the pictures from instead of decoding them again.
        Raises ValueError naming the record for a picture that cannot be read.
        """
        if seen is not None:
            return replace(seen, ids=self._assemble(record, hint, seen.grids).ids)
        pictures = [self._picture(source, record) for source in record.get("images", [])]
        prompt = self._assemble(record, hint, [grid for _, grid in pictures])
        prompt.pixels = torch.cat([x for x, _ in pictures]) if pictures else None
        if prompt.video_grids:
            _, gh, gw = prompt.video_grids[0]
            size = (gw * self.patch, gh * self.patch)
            frames = [np.asarray(self._resized(self._open(source, record)[0], source, record, size))
                      for source in record["video"]]
            prompt.video, _ = patchify(np.stack(frames), self.patch, self.merge, self.temporal)
        return prompt

    def length(self, record: dict, hint: str | None = None) -> int:
        """Tokens that prompt() will give, without decoding the pictures (only their headers)."""
        grids = [self._open(source, record)[1] for source in record.get("images", [])]
        return len(self._assemble(record, hint, grids).ids)

    def _assemble(self, record, hint, grids) -> Prompt:
        question = record["question"] + ("" if hint is None else f"\n[Hint]: {hint}")
        vision, video_grids = [], []
        for t, h, w in grids:
            vision += [("<|vision_start|>", 1), ("<|image_pad|>", t * h * w // self.merge**2),
                       ("<|vision_end|>", 1)]
        if record.get("video"):
            grid, times = self._video(record)
            video_grids.append(grid)
            for time in times:      # a video is a row of stamped moments, each like a picture
                vision += [f"<{time:.1f} seconds>", ("<|vision_start|>", 1),
                           ("<|video_pad|>", grid[1] * grid[2] // self.merge**2),
                           ("<|vision_end|>", 1)]
        return Prompt(self._encode(
            ("<|im_start|>", 1), f"system\n{SYSTEM}", ("<|im_end|>", 1), "\n",
            ("<|im_start|>", 1), "user\n", *vision, question, ("<|im_end|>", 1), "\n",
            ("<|im_start|>", 1), "assistant\n"), None, grids, None, video_grids)

    def _video(self, record) -> tuple[tuple[int, int, int], list[float]]:
        """Grid of a record's video, and the time of each of its moments (pairs of frames).

        record["video"]: frames, paths or PIL images; times from record["seconds"], one a frame, or
        from record["fps"]. Raises ValueError naming the record if neither is there.
        """
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
        _, (_, gh, gw) = self._open(frames[0], record, self.video_pixels // len(times))
        last = self.temporal - 1
        return (len(times) // self.temporal, gh, gw), [
            (times[i] + times[i + last]) / 2 for i in range(0, len(times), self.temporal)]

    def _encode(self, *parts) -> list[int]:
        """Ids of a mix of plain strings and (control token, repeat) pairs."""
        ids, text = [], ""
        for part in (*parts, None):
            if isinstance(part, str):
                text += part         # BPE may merge across two strings, so join them first
                continue
            if text:
                ids += self._plain.encode(text, add_special_tokens=False).ids
                text = ""
            if part is not None:
                name, repeat = part
                ids += [self.control[name]] * repeat
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; control strings inside it stay text."""
        return self._encode(text)

    def decode(self, ids) -> str:
        """Text of a response; stop and padding ids are left out."""
        ids = [int(i) for i in ids]
        skip = self.stop_ids | {self.pad_id}
        return self.tokenizer.decode([i for i in ids if i not in skip], skip_special_tokens=False)

    def _open(self, source, record, most=math.inf) -> tuple[Image.Image, tuple[int, int, int]]:
        """The upright picture, not yet decoded where that can wait, and its grid of patches."""
        try:
            image = source if isinstance(source, Image.Image) else Image.open(source)
            # A quarter turn swaps the sides, so length() must know of it.
            if image.getexif().get(0x0112) in range(2, 9):
                image = ImageOps.exif_transpose(image)
            most = min(self.max_pixels, most)
            height, width = fit(image.height, image.width, self.patch * self.merge,
                                min(self.min_pixels, most), most)
        except Exception as error:  # Pillow's readers raise many kinds, and so does fit()
            raise ValueError(f"record {record.get('id', '?')}: cannot read picture {source}: "
                             f"{error}") from error
        return image, (1, height // self.patch, width // self.patch)

    def _picture(self, source, record) -> tuple[torch.Tensor, tuple]:
        image, (_, gh, gw) = self._open(source, record)
        image = self._resized(image, source, record, (gw * self.patch, gh * self.patch))
        return patchify(np.asarray(image)[None], self.patch, self.merge, self.temporal)

    def _resized(self, image, source, record, size: tuple[int, int]) -> Image.Image:
        try:
            image = to_rgb(image)
        except Exception as error:  # as above: the AVIF reader, for one, raises RuntimeError
            raise ValueError(f"record {record.get('id', '?')}: cannot decode picture {source}: "
                             f"{error}") from error
        return image.resize(size, Image.Resampling.BICUBIC)

    # -- many records

    def batch(self, prompts: list[Prompt], side: str = "left", device=None) -> dict:
        """Pad prompts into the keyword arguments of the model: `model(**processor.batch(prompts))`.

        input_ids, attention_mask, mm_token_type_ids (B, L) and position_ids (3, B, L); with
        pictures also pixel_values (patches, features) and image_grid_thw (pictures, 3). Left
        padding puts the last prompt token of every row in the last column, where sampling reads
        its first logit.
        device: where the tensors go, the CPU if left out.
        """
        if side not in ("left", "right"):
            raise ValueError(f"side is {side!r}, expected 'left' or 'right'")
        B, L = len(prompts), max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((B, L), self.pad_id)
        mask = torch.zeros(B, L, dtype=torch.long)
        positions = torch.zeros(3, B, L, dtype=torch.long)  # padding is never attended to
        for row, prompt in enumerate(prompts):
            n = len(prompt.ids)
            where = slice(L - n, L) if side == "left" else slice(0, n)
            ids[row, where] = torch.tensor(prompt.ids)
            mask[row, where] = 1
            positions[:, row, where] = rope_positions(prompt, self.image_id, self.merge,
                                                         self.video_id)
        out = {"input_ids": ids, "attention_mask": mask, "position_ids": positions,
               "mm_token_type_ids": (ids == self.image_id).int() + 2 * (ids == self.video_id).int()}
        if any(prompt.grids for prompt in prompts):
            out["pixel_values"] = torch.cat([p.pixels for p in prompts if p.pixels is not None])
            out["image_grid_thw"] = torch.tensor([grid for p in prompts for grid in p.grids])
        if any(prompt.video_grids for prompt in prompts):
            videos = [p.video for p in prompts if p.video is not None]
            out["pixel_values_videos"] = torch.cat(videos)
            out["video_grid_thw"] = torch.tensor([grid for p in prompts for grid in p.video_grids])
        return {name: tensor.to(device) for name, tensor in out.items()}

    def in_turn(self, prompts, device=None):
        """A function that makes a batch of the next n of `prompts`, any iterable, or None."""
        prompts = iter(prompts)

        def read(n: int):
            part = list(islice(prompts, n))
            return self.batch(part, device=device) if part else None
        return read


def rope_positions(prompt: Prompt, image_id: int, merge: int, video_id: int = -1) -> torch.Tensor:
    """(3, L) multimodal rotary positions (M-RoPE): time, row and column of every token.

    Text counts on all three axes alike. A picture's tokens share one time and spread over rows and
    columns from there; the text after it goes on behind the largest of them. Three words, a picture
    of 2 x 3 visual tokens, one word:

    >>> p = Prompt([5, 6, 7] + [9] * 6 + [8], None, [(1, 4, 6)])
    >>> rope_positions(p, image_id=9, merge=2).tolist()
    [[0, 1, 2, 3, 3, 3, 3, 3, 3, 6], [0, 1, 2, 3, 3, 3, 4, 4, 4, 6], [0, 1, 2, 3, 4, 5, 3, 4, 5, 6]]
    """
    pieces, here, start = [], 0, 0
    # each moment of a video stands between marks of its own, so it is placed like a picture
    moments = [(1, h, w) for t, h, w in prompt.video_grids for _ in range(t)]
    grids = {image_id: list(prompt.grids), video_id: moments}
    while start < len(prompt.ids):
        if prompt.ids[start] in grids:
            t, h, w = grids[prompt.ids[start]].pop(0)
            h, w = h // merge, w // merge
            block = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)) + here
            pieces.append(block.T)
            start, here = start + t * h * w, here + max(t, h, w)
        else:
            end = start + 1
            while end < len(prompt.ids) and prompt.ids[end] not in grids:
                end += 1
            n = end - start                     # a run of text at once: a tensor per word is slow
            pieces.append((torch.arange(n) + here).expand(3, -1))
            start, here = end, here + n
    return torch.cat(pieces, dim=1)


# ---------------------------------------------------------------------------- checkpoints

def find_folder(path) -> Path:
    """The local folder of a checkpoint: a folder as it is, else a name fetched from the hub."""
    if Path(path).is_dir():
        return Path(path)
    old = Path(f"{Path(path)}.old")
    if old.is_dir():        # save() was killed between its two renames, so the old one is the last
        print(f"{path} is not there, reading {old}, which a killed save left behind")
        return old
    if str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        raise FileNotFoundError(f"{path} is not a folder (and not a hub name like "
                                f"Qwen/Qwen3-VL-2B-Instruct); the tiny default is {TINY}")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.jinja", "*.txt",
                                                                 "*.safetensors"]))
    except Exception as error:  # offline, no such name, no permission: the hub raises many kinds
        reason = str(error).strip().splitlines()[0][:160]
        raise ConnectionError(f"cannot get {path} from the hub ({type(error).__name__}: {reason}); "
                              f"give a local folder, or leave --student out for the tiny default "
                              f"{TINY}") from None


def load(path, dtype=None, device=None, *, min_pixels=None, max_pixels=None, attention="sdpa",
         cue: bool = True):
    """A checkpoint folder or hub name -> (Qwen3VLForConditionalGeneration in eval mode, Processor).

    dtype: default float32 on the CPU, bfloat16 on an accelerator. device: default cuda if there is
    one, else cpu. If the folder holds cue_recovery.safetensors the module is attached (`cue=False`
    leaves it out, as every teacher needs). Raises for another architecture, and for a checkpoint
    whose weights are not exactly the model's: one missing, one too many, one of another shape.
    """
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration
    folder = find_folder(path)
    kind = _read_json(folder / "config.json").get("model_type")
    if kind != "qwen3_vl":
        raise ValueError(f"{folder}: model_type is {kind!r}, this project handles 'qwen3_vl'")
    processor = Processor(folder, min_pixels, max_pixels)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    if device.type == "meta":       # shapes without numbers, which another process will send
        with device:
            config = AutoConfig.from_pretrained(folder)
            model = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype,
                                                                 attn_implementation=attention)
    else:
        model = _read_weights(folder, dtype, attention)
    model = model.to(device).eval()
    if cue and (folder / CUE_FILE).exists():
        try:
            import cue_recovery
        except ImportError as error:
            raise ImportError(f"{folder} has {CUE_FILE}: put cue_recovery.py beside model.py, or "
                              "load with cue=False") from error
        cue_recovery.load(model, folder / CUE_FILE)
    return model, processor


def _read_weights(folder: Path, dtype, attention: str):
    """The model of a folder that has exactly its weights."""
    from transformers import Qwen3VLForConditionalGeneration
    _check_files(folder)
    try:
        # ignore: a wrong shape is to be reported below, by name, with the others
        model, info = Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, output_loading_info=True,
            local_files_only=True, use_safetensors=True, ignore_mismatched_sizes=True)
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
    return model


def _check_files(folder: Path) -> None:
    """Refuse a folder without weights, or without a file that its index names."""
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists() and not (folder / "model.safetensors").exists():
        names = set(_read_json(index).get("weight_map", {}).values())
    absent = sorted(name for name in names if not (folder / name).exists())
    if absent or not names:
        raise FileNotFoundError(f"{folder}: {len(absent)} of {len(names)} weight files are "
                                f"missing: {absent[:5]}")


def quiet() -> None:
    """Switch off transformers' own progress bars, for scripts that print their own."""
    from transformers.utils import logging
    logging.disable_progress_bar()


def save(model, processor: Processor, folder, notes: dict | None = None,
         weights: dict | None = None, max_shard_size="5GB") -> None:
    """Write a plain Hugging Face folder, plus cue_recovery.safetensors when the module is attached.

    The folder appears under its name only when whole: a kill leaves FOLDER.tmp, never half of it. A
    kill between the two renames leaves FOLDER.old, the one before, which load() then reads.
    notes: written beside the weights as evaluation.json. weights: a state dict to be written
    instead of the model's own, as of a model cut over several GPUs. Weights beyond
    `max_shard_size` go to several files with an index, as the published 8B has them. Raises
    OSError when the disk is full.
    """
    folder = Path(folder)
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(model, processor, temporary, weights, max_shard_size)
        if notes is not None:
            (temporary / "evaluation.json").write_text(json.dumps(notes) + "\n")
        for path in temporary.iterdir():       # the data must be on disk before the name is
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)    # on a full disk every byte counts
        raise OSError(f"cannot write {folder}: {error}") from error
    # FOLDER.old goes only now: after a kill between the two renames it may be the last whole one
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def _write(model, processor, temporary: Path, weights, max_shard_size) -> None:
    cue = getattr(model, "cue_recovery", None)
    weights = model.state_dict() if weights is None else weights
    module = {k: v for k, v in weights.items() if k.startswith("cue_recovery.")}
    model.save_pretrained(temporary, max_shard_size=max_shard_size,
                          state_dict={k: v for k, v in weights.items() if k not in module})
    for name in PROCESSOR_FILES:
        if (processor.folder / name).exists():
            shutil.copyfile(processor.folder / name, temporary / name)
    # A student trained on pictures of one size is to be used on pictures of that size.
    pictures = _read_json(temporary / "preprocessor_config.json")
    size = {"shortest_edge": processor.min_pixels, "longest_edge": processor.max_pixels}
    if pictures.get("size") != size:
        pictures["size"] = size
        for old_name in ("min_pixels", "max_pixels"):
            pictures.pop(old_name, None)
        (temporary / "preprocessor_config.json").write_text(json.dumps(pictures, indent=2) + "\n")
    if cue is not None:
        module = {k.removeprefix("cue_recovery."): v for k, v in module.items()}
        cue.save(temporary / CUE_FILE, module)


def _read_json(path: Path, missing=None) -> dict:
    if not path.exists():
        if missing is not None:
            return missing
        raise FileNotFoundError(f"{path.parent} is not a Qwen3-VL folder: {path.name} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
