"""scale/identity.py - one folder, one run: who may write into it, and is a resumed run the same?

The idea.  Two processes in one folder mix their metrics, and the last checkpoint wins. A run that
goes on with other data compares before and after on different questions, and calls it a gain.
Neither shows in the numbers, so both are refused at the start, in one line.

    start  -> lock RUN/lock -> digests of data, student and teacher -> RUN/args.json
    resume -> lock RUN/lock -> the same digests? ---------------------> go on, or say what changed

In:  a run's folder and its settings.  Out: owned(), around the run; the digests; the settings.

1) The lock is the kernel's (flock), so a killed run does not leave it behind. Its text only says
   who holds it. A network file system keeps it between hosts if it has locks (NFS version 4 does).
   Where there are none (some cluster file systems, Windows) one line says so, and the run goes on.
2) The digest of a weight file takes its size and sixteen blocks of it: enough to see that it was
   trained or exchanged, and an 8B model costs no minute. Files below 16 MiB are read whole.
Left out: digests of the pictures.
"""
from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
from dataclasses import asdict
from pathlib import Path

try:
    import fcntl
except ImportError:             # Windows
    fcntl = None

import model as qwen
from scale import checkpoint, checks, sharding
from scale.settings import parser_of

BLOCK = 1 << 20
# What --resume takes: limits, what changes memory and not the result, and data that were moved.
LIMITS = {"steps", "max_hours", "max_tokens"}
MEMORY = {"sample_batch", "micro_batch_tokens", "gradient_checkpointing", "offload_teacher",
          "offload_optimizer", "graph_decoding", "gpu_memory", "device", "threads", "check"}
SOURCES = {"data": "the training records", "eval_data": "the test records",
           "dev_data": "the dev records", "student": "the start checkpoint",
           "teacher": "the teacher"}
MOVABLE = {"data", "eval_data", "dev_data"}
# What a setting meant before it had a name: for runs that were begun then.
OLDER = dict(threads=0, before_limit=0, instruction="", dev_data="test")
NO_PATH = ("", "self", "ema", "test")          # what stands in these settings beside paths


# ---------------------------------------------------------------------------- one owner

@contextlib.contextmanager
def owned(folder: Path, new: bool, script: str = "distill.py"):
    """Around a run: nobody else writes into its folder, and whatever ends it is one line.

    new: the folder must not hold a run yet. script: whose line it is. Of several processes rank 0
    holds the lock. A run that fails before it has written its settings leaves no folder.
    """
    if not sharding.is_main():
        with checks.one_line(script):
            yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / "lock")
    try:
        if new and (folder / "args.json").exists():
            raise FileExistsError(f"{folder} exists: choose another --name, or go on with "
                                  f"--resume {folder}")
        with checks.one_line(script, lambda: how_to_go_on(folder)):
            yield
    finally:
        with contextlib.suppress(OSError):
            (folder / "lock").unlink()         # while it is still ours
            lock.close()
            if not (folder / "args.json").exists():
                folder.rmdir()                 # only if empty
        lock.close()


def take_lock(path: Path):
    """The open lock file; ValueError if another process holds it."""
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                raise OSError("this system has no flock")
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise ValueError(f"{path.parent} is in use by {owner}: two runs in one folder would "
                             "mix; choose another --name, or wait for that one") from None
        except OSError as error:
            print(f"{path}: cannot be locked ({error}); see to it that no other run writes there")
            return file
        # the owner before may have removed the file after we opened it: then lock the new one
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
                return file
        file.close()


def how_to_go_on(folder: Path) -> str:
    """What is saved of a run that ends now, and the command that goes on; empty if nothing is."""
    if not (folder / "args.json").exists():
        return ""
    step = checkpoint.saved_step(folder / "state")
    saved = "no state" if step is None else f"the state after step {step}"
    return f"; {saved} is saved, go on with {checkpoint.resume_command(folder)}"


# ---------------------------------------------------------------------------- the same run

def file_digest(path) -> str:
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            whole.update(block)
    return whole.hexdigest()


def checkpoint_digest(folder: Path) -> str:
    """Of settings, tokenizer and weights, note 2. A folder that was copied has the same."""
    whole = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        whole.update(f"{name} {file_digest(folder / name)}\n".encode())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        whole.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(BLOCK, size // 16)):     # the first has the header
                file.seek(start)
                whole.update(file.read(BLOCK))
    return whole.hexdigest()


def check_sources(folder: Path, config) -> dict:
    """The digests of what the run is made from; ValueError naming what is not as it was.

    Fetches the models, which a run needs next. An older run has no digests to compare with.
    """
    if not sharding.is_main():
        return {}
    path = folder / "args.json"
    saved = checkpoint.read_json(path).get("digests", {}) if path.exists() else {}
    paths = {name: getattr(config, name) for name in ("data", "eval_data", "dev_data")}
    now = {name: path if path in NO_PATH else file_digest(path) for name, path in paths.items()}
    check_same(folder, config, saved, now)              # before an hour of fetching weights
    now["student"] = checkpoint_digest(qwen.find_folder(config.student))
    now["teacher"] = (config.teacher if config.teacher in ("self", "ema") else
                      checkpoint_digest(qwen.find_folder(config.teacher)))
    check_same(folder, config, saved, now)
    if config.privilege == "none" and now["teacher"] == now["student"]:
        raise checkpoint.Refused(f"--privilege none: {config.teacher} holds the student's own "
                                 "weights, so it agrees with the student, at a loss of zero")
    return now


def check_same(folder: Path, config, saved: dict, now: dict) -> None:
    changed = [f"{SOURCES[name]} changed: {getattr(config, name)} has the digest "
               f"{digest[:12]}, {folder} began with {str(saved[name])[:12]}"
               for name, digest in now.items() if saved.get(name, digest) != digest]
    if changed:
        raise checkpoint.Refused("; ".join(changed) + ". Put it back, or start a new run")


# ---------------------------------------------------------------------------- the settings

def read_settings(kind, toy: dict, about: str, argv, method: str = ""):
    """(settings, folder of the run to resume or None) of a command line; what is wrong ends it.

    kind: the dataclass. toy: what the tiny student changes. method: as settings_of_run has it.
    """
    parser = parser_of(kind, about)
    typed = vars(parser.parse_args(argv))
    resume = Path(typed.pop("resume")) if typed.get("resume") else None
    try:
        if resume:
            typed = settings_of_run(resume, typed, kind.__dataclass_fields__, method)
        elif checks.is_tiny(typed.get("student", qwen.TINY)):
            typed = {**toy, **typed}
        config = kind(**typed)
        # the process as well: runs that start in the same second are two
        config.name = config.name or f"{time.strftime('%Y-%m-%d-%H%M%S')}-{os.getpid()}"
        checks.check_settings(config)
        make_absolute(config)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return config, resume


def settings_of_run(folder: Path, typed: dict, known, method: str = "") -> dict:
    """The settings in RUN/args.json, and those typed beside --resume; ValueError for others.

    known: the names of all settings. What the run does not name keeps its default.
    method: what trains it, empty for distill.training_step: the one with which the run began.
    """
    other = sorted(typed.keys() - LIMITS - MEMORY - MOVABLE)
    if other:
        raise ValueError(f"--resume takes the run's own settings; leave out {', '.join(other)}")
    path = folder / "args.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: is {folder} the folder of a run?")
    own = checkpoint.read_json(path)
    if not own:
        raise ValueError(f"{path}: damaged, it names no setting")
    if own.pop("method", "") != method:
        raise ValueError(f"{folder} was begun with another method; go on with "
                         + checkpoint.resume_command(folder))
    digests = own.pop("digests", {})
    unknown = sorted(own.keys() - set(known))
    if unknown or not isinstance(digests, dict):
        raise ValueError(f"{path}: not the settings of a run of this version: "
                         f"{', '.join(unknown) or 'digests'}")
    done = checkpoint.saved_step(folder / "state") or 0
    if typed.get("steps", done) < done:
        raise ValueError(f"--steps {typed['steps']}: {folder} has done {done} already")
    for name in sorted(typed.keys() & MOVABLE - digests.keys()):
        raise ValueError(f"{path} has no digest to compare the {name} with, as a run of an older "
                         "version: put the records back to where they were")
    for name in ("eval_data", "dev_data"):
        path = own.get(name, "test")
        if "data" in typed and name not in typed and path != "test" and not os.path.exists(path):
            own[name] = ""                   # moved too: looked for beside the training records
    return {**OLDER, **own, **typed}


def write_settings(folder: Path, config, digests: dict, method=None) -> None:
    """Write RUN/args.json, which settings_of_run() reads: from here on the folder is a run's."""
    if sharding.is_main():
        named = {"method": method.__name__} if method else {}
        checkpoint.write_json(folder / "args.json", asdict(config) | named | {"digests": digests})


def make_absolute(config) -> None:
    """Paths as they are from any folder, so that a run can be resumed from another one."""
    for name in SOURCES:
        value = getattr(config, name)
        if value not in NO_PATH and os.path.exists(value):
            setattr(config, name, os.path.abspath(value))
