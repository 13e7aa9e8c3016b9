"""scale/checks.py - what can be known to be wrong before a weight is fetched.

The idea.  The weights of a real model take an hour to fetch and minutes to load. Names of devices
and numbers, the settings and tokenizers of both models, and whether they fit each other cost a
second. So they are looked at first, and what is wrong is one line.

In:  what was typed (distill.Config).  Out: the student's Processor; or a ValueError.
     Around a script: with one_line("name.py"): whatever ends it is one line on any console.
"""
from __future__ import annotations

import argparse
import json
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

import model as qwen
import teacher as teaching
from data import records as record_files, sources, toy
from scale import checkpoint, plan, sharding

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "float64": torch.float64}
ATTENTION = {"sdpa": None, "eager": None, "flash_attention_2": "flash_attn",
             "flash_attention_3": "flash_attn_interface"}      # name -> the package it needs


# ---------------------------------------------------------------------------- how a script ends

@contextmanager
def one_line(script: str, advice=lambda: ""):
    """Around a script: wrong input, a failed disk, NaN or Ctrl-C become one line, not a trace.

    advice(): what is saved and how to go on, or nothing. Ctrl-C leaves with the code 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # an answer in Chinese must not end a run on cp1252
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        # "[Errno 2] No such file or directory: 'a'" as a sentence
        known = getattr(error, "filename", None)
        said = f"{error.filename}: {error.strerror}" if known else error
        again = "" if isinstance(error, checkpoint.Refused) else advice()
        raise SystemExit(f"{script}: {said}{again}") from error
    except KeyboardInterrupt:
        if sharding.is_main():
            print(f"\n{script}: stopped{advice() or '; nothing is saved yet'}", file=sys.stderr)
        raise SystemExit(130) from None


def quiet() -> None:
    """No bar while weights are read from disk, for scripts that print their own; downloads keep it.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging
    silent = are_progress_bars_disabled()
    logging.disable_progress_bar()      # switches the hub's bars off too, and 5 GB take a while
    if not silent:
        enable_progress_bars()


@contextmanager
def named(place: str):
    """NaN met in this block is reported with the place, a step or an evaluation, before it."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{place}: {error}") from error


# ---------------------------------------------------------------------------- what was typed

def out_of_range(value, low: float, high: float) -> str:
    """What to say of a number that is out of its range, as NaN always is; empty if it is not."""
    if low <= value <= high:
        return ""
    return f"is {value}, expected " + (f"at least {low:g}" if high == math.inf
                                       else f"from {low:g} to {high:g}")


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a number in its range."""
    def read(text):
        value = kind(text)
        if wrong := out_of_range(value, low, high):
            raise argparse.ArgumentTypeError(wrong)
        return value
    read.__name__ = kind.__name__       # which argparse shows for what is no number at all
    return read


def check_settings(config) -> None:
    """Every setting has its type, is one of its choices and lies in its range, or ValueError.

    argparse has seen to some of this, but not for settings that come from a file.
    """
    for f in fields(config):
        value, kind, flag = getattr(config, f.name), type(f.default), f.name.replace("_", "-")
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise ValueError(f"--{flag} is {value!r}, expected {kind.__name__}")
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"--{flag} is {value!r}, none of {', '.join(choices)}")
        if kind in (int, float) and (wrong := out_of_range(value, *f.metadata["range"])):
            raise ValueError(f"--{flag} {wrong}")
    name = Path(config.name)
    if config.name and (name.is_absolute() or ".." in name.parts or not name.parts):
        raise ValueError(f"--name {name} is no folder below runs/")


def check_placement(device=None, dtype=None,
                    attention: str = "sdpa") -> tuple[torch.device, torch.dtype]:
    """The device and dtype that these names mean; ValueError for what cannot work on this machine.

    device: default cuda if there is one, else cpu. dtype: default float32 on the CPU, bfloat16 on
    a GPU.
    """
    here = {"cpu": True, "meta": True, "cuda": torch.cuda.is_available()}
    name = str(device or ("cuda" if here["cuda"] else "cpu"))
    if name.split(":")[0] == "mps":
        raise ValueError("--device mps: sampling adds up probabilities in float64, which an Apple "
                         "GPU does not have; take --device cpu")
    if not re.fullmatch(r"(cpu|meta|cuda)(:\d+)?", name):
        raise ValueError(f"--device {name!r} is none of cpu, cuda, cuda:N")
    device = torch.device(name)
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not here[device.type] or (device.index or 0) >= count:
        raise ValueError(f"--device {name}: PyTorch {torch.__version__} finds no such device here "
                         f"(it finds {', '.join(k for k in here if here[k] and k != 'meta')})")
    if not dtype:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = DTYPES.get(str(dtype).removeprefix("torch."), dtype)
    if dtype not in DTYPES.values():
        raise ValueError(f"--dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if attention not in ATTENTION:
        raise ValueError(f"--attention {attention!r} is none of {', '.join(ATTENTION)}")
    package = ATTENTION[attention]
    if package and not (here["cuda"] and find_spec(package)):
        raise ValueError(f"--attention {attention} needs a CUDA GPU and the package {package}; "
                         "sdpa needs neither")
    if package and dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"--attention {attention} computes in bfloat16 or float16, not in "
                         f"{str(dtype).removeprefix('torch.')}; sdpa does")
    if attention == "eager" and dtype == torch.float64:
        raise ValueError("--attention eager takes its softmax in float32, where float64's mask is "
                         "-inf and padding NaN; for --dtype float64 take --attention sdpa")
    return device, dtype


@contextmanager
def hub_advice(name):
    """Inside, a model that the hub does not give is one line that says what to do."""
    try:
        yield
    except ConnectionError as said:         # by model.find_folder
        from huggingface_hub import constants, errors
        error = said.__context__
        status = getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)
        page, login = f"{constants.ENDPOINT}/{name}", "log in with `hf auth login`"
        if isinstance(error, errors.GatedRepoError) or status == 403:
            advice = f"access is restricted: accept the licence on {page} and {login}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            advice = f"there is no such model, or it is private: check the name, or {login}"
        elif constants.HF_HUB_OFFLINE:
            advice = "not all of it is in the cache, and HF_HUB_OFFLINE=1 forbids to fetch it"
        else:
            advice = "run again, what is there is kept and a cut file goes on where it was cut"
        raise ConnectionError(str(said).replace(" from the hub (", f" from the hub: {advice} (", 1)
                              ) from None


def small_files(name, min_pixels=None, max_pixels=None) -> qwen.Processor:
    """The processor of a folder or hub name, whose weights are not fetched yet.

    Refuses, by name, an adapter without its model and quantised weights whose library is missing.
    """
    with hub_advice(name):
        folder = qwen.find_folder(name, weights=False)
    adapter = folder / "adapter_config.json"
    if adapter.exists() and not (folder / "config.json").exists():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise ValueError(f"{folder} holds an adapter only, no model: merge it into {base} (peft: "
                         "merge_and_unload(), then save_pretrained()) and give the merged folder")
    config = qwen.model_config(folder)
    quantised = config.get("quantization_config") or config.get("text_config", {}).get(
        "quantization_config")
    if quantised:
        from transformers.quantizers import AutoHfQuantizer
        try:
            AutoHfQuantizer.from_config(quantised, pre_quantized=True).validate_environment()
        except Exception as error:      # a library, a GPU or the method itself is not there
            raise ValueError(f"{folder}: the weights are quantised ({quantised.get('quant_method')}"
                             f") and cannot be read here: {' '.join(str(error).split())}; the "
                             "checkpoint without quantisation needs nothing more") from None
    return qwen.Processor(folder, min_pixels, max_pixels)


def is_tiny(student) -> bool:
    """Is this the checkpoint that ships with the project, or a student of it, wherever it stands?

    By the tokenizer: a student's is a copy of it, and no other model has these 512 words.
    """
    own, tiny = (Path(folder) / "tokenizer.json" for folder in (student, qwen.TINY))
    return own.is_file() and own.read_bytes() == tiny.read_bytes()


def check_models(config) -> qwen.Processor:
    """The student's processor, after all that the small files of both models can tell.

    Fetches config.json, tokenizer and picture settings only. Raises ValueError, FileNotFoundError
    or ConnectionError, one line each.
    """
    if config.offload_teacher and config.teacher == "ema":
        raise ValueError("--offload-teacher: an averaged teacher changes at every step, so it must "
                         "stay beside the student")
    if config.train == "cue" and not config.cue_recovery:
        raise ValueError("--train cue trains the module only, and --no-cue-recovery leaves it out")
    if config.privilege == "none" and config.teacher in ("self", "ema", config.student):
        raise ValueError(f"--privilege none: a teacher that is told nothing and is the student too "
                         f"(--teacher {config.teacher}) agrees with it, at a loss of zero; give a "
                         "bigger --teacher or another --privilege")
    for used, flag, names in ((config.train == "lora", "--train lora", "lora_rank lora_alpha"),
                              (config.teacher == "ema", "--teacher ema", "ema_decay"),
                              (config.cue_recovery, "--cue-recovery", "every sink")):
        for f in fields(config):
            if not used and f.name in names.split() and getattr(config, f.name) != f.default:
                print(f"WARNING: --{f.name.replace('_', '-')} has no effect without {flag}")
    check_placement(config.device, config.dtype, config.attention)
    if config.teacher == "ema" and config.train in ("cue", "lora"):
        raise ValueError(f"--teacher ema: with --train {config.train} the backbone stays as it is, "
                         "and so would its average; take --teacher self")
    if config.teacher == "ema" and "flash" in config.attention:
        raise ValueError(f"--teacher ema is kept in float32, which --attention {config.attention} "
                         "does not compute in; take sdpa")
    names = [config.student, *([] if config.teacher in ("self", "ema") else [config.teacher])]
    processors = [small_files(name, config.min_pixels or None, config.max_pixels or None)
                  for name in names]
    if len(names) == 2:
        student, teacher = processors
        rows = [qwen.model_config(p.folder)["text_config"]["vocab_size"] for p in processors]
        teaching.check_same_vocabulary(student.vocab, teacher.vocab, *rows)
        if (student.patch, student.merge) != (teacher.patch, teacher.merge):
            raise ValueError(f"student and teacher cut pictures into patches of {student.patch} "
                             f"and {teacher.patch} pixels, so they cannot read the same prompt")
        if student.answer_prefix != teacher.answer_prefix:
            raise ValueError(f"answers of {names[0]} begin with {student.answer_prefix!r} and "
                             f"answers of {names[1]} with {teacher.answer_prefix!r}: take an "
                             "Instruct teacher for an Instruct student, or both Thinking")
        print(f"stop ids: student {sorted(student.stop_ids)}, teacher {sorted(teacher.stop_ids)}")
    return processors[0]


def check_data(config, processor) -> tuple[list[dict], list[dict], list[dict]]:
    """Training, test and dev records; prompts over the limit are left out and counted, never cut.

    Without --data: a drawn world of the student's size. Without dev records the test records are
    returned in their place. Raises ValueError by file and line.
    """
    if not config.data and not is_tiny(config.student):
        print("no --data: training on the drawn world of data/toy.py, at a real model's size")
    config.data = config.data or str(toy.default(large=not is_tiny(config.student)) / "train.jsonl")
    config.eval_data = config.eval_data or str(Path(config.data).with_name("test.jsonl"))
    if not config.dev_data:
        beside = Path(config.data).with_name("dev.jsonl")
        useful = config.eval_every and beside.exists() and beside != Path(config.data)
        config.dev_data = str(beside) if useful else "test"
    if Path(config.eval_data).resolve() == Path(config.data).resolve():
        print(f"WARNING: {config.data} is trained on and is the test: accuracy will say what was "
              "learned by heart")
    # kind -> (file, how many of its records, what the teacher is told of them)
    limit = config.eval_limit or None
    files = {"training": (config.data, None, config.privilege),
             "test": (config.eval_data, limit, config.privilege),
             "dev": (config.dev_data, limit, "none")}
    if config.dev_data == "test":
        del files["dev"]
    for path, _, _ in files.values():
        if command := sources.known_raw(path):
            raise ValueError(f"{path} holds raw files; make records of them: {command}")
    out = {kind: [{"instruction": config.instruction, **record}
                  for record in record_files.load(path, teaching.NEEDS[told])][:most]
           for kind, (path, most, told) in files.items()}
    if config.train == "cue" and not any(r["images"] or r.get("video") for r in out["training"]):
        raise ValueError(f"{config.data}: no record has a picture, so --train cue would train "
                         "nothing: the module asks the picture")
    record_files.check_pictures(sum(out.values(), []), config.check)
    for kind, (path, _, told) in files.items():
        kept = [r for r in tqdm(out[kind], f"{kind} prompts", disable=None, leave=False)
                if longest_prompt(r, told, processor) <= config.max_prompt_tokens]
        if not kept:
            raise ValueError(f"{path}: no prompt fits in --max-prompt-tokens "
                             f"{config.max_prompt_tokens}; lower --max-pixels or raise the limit")
        print(f"{len(kept)} {kind} records from {path}, {len(out[kind]) - len(kept)} left out as "
              f"longer than {config.max_prompt_tokens} tokens")
        out[kind] = kept
    if config.dev_data == "test" and config.eval_every:
        print("no dev records (--dev-data): evaluations inside the run, and the choice of the best "
              "student, use the test records")
    return out["training"], out["test"], out.get("dev", out["test"])


def longest_prompt(record: dict, privilege: str, processor) -> int:
    """Tokens of the student's prompt or the teacher's: a hint makes it longer, a view may not."""
    seen = teaching.seen(record, privilege)
    told = processor.length(seen, teaching.hint(record, privilege))
    return told if seen is record else max(told, processor.length(record))


def check_memory(config) -> None:
    """Fill in --sample-batch and --micro-batch-tokens where they are 0, by the free memory.

    The plan counts the longest prompts and answers that the settings allow. Raises ValueError, with
    the flags that would help, if even then the run needs more than there is. --gpu-memory, if
    given, counts instead of what the GPU says. On a CPU nothing is looked up.
    """
    device, _ = check_placement(config.device, config.dtype, config.attention)
    memory = config.gpu_memory
    if not memory and device.type == "cuda":
        memory = torch.cuda.mem_get_info()[0] / plan.GB
    if not memory:
        return plan.choose_sizes(config, 0)
    sized, said = plan.fitted(config, memory)
    if not said.startswith("fits"):
        raise ValueError(said)
    for name in ("sample_batch", "micro_batch_tokens", "score_privilege"):
        setattr(config, name, getattr(sized, name))
    print(said.splitlines()[0])


def check_all(config) -> tuple:
    """The settings, filled in, and training, test and dev records. Rank 0 looks first."""
    with sharding.main_first():
        records = check_data(config, check_models(config))
    if sharding.is_main():
        check_memory(config)
    return sharding.from_main(config), *records


@contextmanager
def memory_advice(config, folder):
    """Inside, what to do when half the rows and half the micro-batch did not help is one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        rows, tokens = max(1, config.sample_batch // 2), max(1, config.micro_batch_tokens // 2)
        raise MemoryError(
            f"out of memory with --sample-batch {config.sample_batch} --micro-batch-tokens "
            f"{config.micro_batch_tokens}; go on with less: {checkpoint.resume_command(folder)} "
            f"--sample-batch {rows} --micro-batch-tokens {tokens}") from None


def halved_if_too_large(take, config, student, scale):
    """take(), a step. Out of memory, rows and micro-batches are halved for good, once, and it is
    taken again: it draws the same tokens, however it is cut."""
    try:
        return take()
    except torch.OutOfMemoryError:
        if sharding.world > 1 or scale.halved:
            raise
    # what the failed step holds is freed only behind that block
    scale.halved = True
    config.sample_batch = max(1, config.sample_batch // 2)
    config.micro_batch_tokens = max(1, config.micro_batch_tokens // 2)
    print(f"\nout of memory: going on with --sample-batch {config.sample_batch} "
          f"--micro-batch-tokens {config.micro_batch_tokens}", flush=True)
    student.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return take()
