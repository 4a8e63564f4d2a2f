"""A script: break `s3lab prune` off at one file operation after the other, go on with it, and report what came of it.

python tests/faults/kills.py FOLDER STEP, where STEP is how many operations lie between two that are tried.  It prints
one line of JSON.  Each attempt is a fork of this process, which has imported everything.
"""

import json
import os
import resource
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import safetensors.torch
import torch
from count import Count
from safetensors import SafetensorError, safe_open
from transformers import Qwen3Config, Qwen3ForCausalLM

from s3lab.files import PARTS
from s3lab.folder import claim
from s3lab.lab.cli import main
from s3lab.models.storage import checkpoint  # noqa: F401  imported here, and not in each fork
from s3lab.models.text.corpus import documents
from s3lab.models.text.pretrained import load_model

NOBODY = 65534
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 2048}
OPTIONS = ["--spec", "2:4", "--solver", "sparsegpt", "--sequences", "4", "--length", "32"]


def count_tensors(counter, torn):
    """Have a counter hear of files of tensors, too, which no hook tells of; ``torn``, the last is written by half."""
    serialize = safetensors.torch.serialize_file

    def write_half(tensors, path):
        serialize(tensors, path)
        os.truncate(path, os.path.getsize(path) // 2)

    def count_serialize(tensors, path, metadata=None):
        counter.meet("tensors", path, lambda: torn and write_half(tensors, path))
        return serialize(tensors, path, metadata)

    safetensors.torch.serialize_file = count_serialize


def fork(work):
    """Run ``work`` in a fork; return its exit status, negative for a signal, and what it said."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(read)
        with os.fdopen(write, "w") as pipe, redirect_stdout(pipe), redirect_stderr(pipe):
            status = work()
        os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def prune(tiny, out):
    return main(["prune", str(tiny), *OPTIONS, "--out", str(out)])


def prune_counted(tiny, out, at=None, torn=False):
    count_tensors(Count(out, f"{out}.tally", at), torn)
    return prune(tiny, out)


def list_results(out):
    """The bytes of all files of a run by name, but for those that tell times, and the lock and its mark."""
    files = [path for path in out.rglob("*") if path.is_file() and not path.name.startswith(".s3lab")]
    return {
        str(path.relative_to(out)): "" if path.name in ("s3lab.json", "manifest.json") else path.read_bytes()
        for path in files
    }


def find_torn(out):
    """What cannot be read of a folder; parts, which nobody takes for files, do not count."""
    torn = []
    for path in sorted(out.rglob("*")):
        if path.is_file() and not any(Path(name).match(PARTS) for name in path.relative_to(out).parts):
            try:
                if path.suffix == ".json" or path.name == ".s3lab":
                    json.loads(path.read_text())
                elif path.suffix == ".safetensors":
                    with safe_open(path, "pt") as file:
                        list(file.keys())
            except (ValueError, SafetensorError) as error:
                torn.append(f"{path.relative_to(out)}: {error}")
    return torn


def go_on(tiny, out, whole):
    """Run again what was broken off, and tell what is wrong with its end."""
    status, said = fork(lambda: prune(tiny, out))
    found = list_results(out) if out.exists() else {}
    wrong = [] if status == 0 else [f"exit {status}: {said}"]
    wrong += [f"{name} differs" for name in {**whole, **found} if whole.get(name) != found.get(name)]
    return wrong + [f"left: {path.name}" for path in out.rglob(PARTS)]


def try_kill(tiny, out, at, torn, whole):
    """Kill a run at one operation, and go on."""
    status, said = fork(lambda: prune_counted(tiny, out, at, torn))
    wrong = [] if status == -signal.SIGKILL else [f"exit {status}: {said}"]
    return {"at": at, "torn": torn, "wrong": wrong + find_torn(out) + go_on(tiny, out, whole)}


def try_refused(tiny, out, whole, before, after=lambda: None):
    """Run where nothing, or not all, can be written, which ``before`` sees to, and go on once it can."""
    status, said = fork(lambda: (before(), prune(tiny, out))[1])
    told = said.splitlines()[-1:]  # after the progress bar
    wrong = [] if status == 2 and told and told[0].startswith("s3lab: ") and "Traceback" not in said else [f"{status}"]
    wrong += [f"left: {path.name}" for path in out.rglob(PARTS)] + find_torn(out)
    after()
    return {"said": told, "wrong": wrong + go_on(tiny, out, whole)}


def try_read_only(tiny, out, whole):
    """Run as a user who may read a folder and not write there, with a run that was broken off in it."""
    fork(lambda: prune_counted(tiny, out, at=30))
    out.chmod(0o555)

    def become_nobody():
        prune(tiny, out.with_name("before"))  # imports all that it takes: nobody may not even read the checkout
        os.setuid(NOBODY)

    return try_refused(tiny, out, whole, become_nobody if os.getuid() == 0 else lambda: None, lambda: out.chmod(0o755))


def try_held(tiny, out, whole):
    """Run while another process holds the folder, which is then killed."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        with claim(out):
            os.write(write, b"!")
            signal.pause()
    os.read(read, 1)
    found = try_refused(tiny, out, whole, lambda: None, lambda: os.kill(pid, signal.SIGKILL) or os.waitpid(pid, 0))
    return found if f"in use by process {pid} on " in found["said"][0] else {**found, "wrong": found["said"]}


def report(home, step):
    """Try all, and return what was tried and what was found."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tiny = home / "tiny"
    Qwen3ForCausalLM(Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(tiny)
    load_model("reference")[1].save_pretrained(tiny)
    documents()

    fork(lambda: prune_counted(tiny, home / "whole"))
    done = (home / "whole.tally").read_text().split()
    whole = list_results(home / "whole")
    sizes = sorted({path.stat().st_size for path in (home / "whole").rglob("*") if path.is_file()})
    kills = [(at, False) for at in range(0, len(done), step)]
    kills += [(at, True) for at, what in enumerate(done) if what == "tensors"][:: max(1, step // 4)]
    limits = [size - 1 for size in sizes if size][:: max(1, step // 8)]

    def limit(size):
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return {
        "operations": len(done),
        "kills": [try_kill(tiny, home / f"kill-{at}-{torn}", at, torn, whole) for at, torn in kills],
        "full": [try_refused(tiny, home / f"full-{size}", whole, limit(size)) for size in limits],
        "read-only": [try_read_only(tiny, home / "read-only", whole)],
        "held": [try_held(tiny, home / "held", whole)],
    }


if __name__ == "__main__":
    print(json.dumps(report(Path(sys.argv[1]), int(sys.argv[2]))))
