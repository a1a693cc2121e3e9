"""Hold HEAD against an earlier commit, to the bit: `python tests/freeze.py --base COMMIT`.

A worktree of the base is checked out beside this tree. Both run the same probes, one thread each, through what users
call (prepare.py, train.py, sample.py and model.py's public interface), and every recorded value must be equal:

    presets    20 losses, two evaluations and the final weights of every preset in config/, made small; a text of 64
               tokens of each; a resume from step 10
    cases      for every case of tests/helpers/cases.py at the base: loss, gradients and logits, in one call and through
               the cache; FLOPs are left out, since they are counted anew
    files      a token file, an encoder, and model files saved by earlier versions: their weights and a greedy text

A restructuring must leave all of it as it is. `--only presets` and `--match REGEX` probe less. Exit code 1 names what
differs.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
PARTS = ("presets", "cases", "files")
SMALL = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_qkv": 32, "d_rank": 8, "n_ffn": 64, "window": 16}
RUN = {"batch_size": 2, "max_iters": 20, "eval_interval": 10, "log_interval": 1, "eval_iters": 1, "warmup_iters": 2,
       "seed": 5, "sample_length": 16, "device": "cpu", "dtype": "float32", "compile": "false",
       "checkpoints.interval": 10, "checkpoints.path": "ck", "model_path": "model.file",
       "img_path": "null"}  # fmt: skip
TEXT = "".join(f"the {word} sat on mat {n} and saw\n  {n * 7919 % 1000} of it.\n\n" for n in range(300) for word in
               ("cat", "owl", "old dog"))  # fmt: skip


# ---- probes: each runs in a tree of its own, in a folder of its own -------------------------------------------------


def run_script(tree: Path, name: str, *argv: str, text: str = "") -> tuple[int, str]:
    """(exit code, standard output) of a script, called in this process."""
    out, before = io.StringIO(), (sys.argv, sys.stdin)
    sys.argv, sys.stdin = [name, *argv], io.TextIOWrapper(io.BytesIO(text.encode()))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
            runpy.run_path(str(tree / name), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv, sys.stdin = before
    if code:
        raise RuntimeError(f"{name} {' '.join(argv)} ended with {code}: {err.getvalue()[-2000:]}")
    return code, out.getvalue()


def digest(tensors: dict) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().contiguous().view(-1).numpy().tobytes())
    return found.hexdigest()


def weights_in(path: Path) -> str:
    from safetensors.torch import load_file

    return digest(load_file(path))


def numbers_in(metrics: Path) -> list:
    """What a run's lines say, less what depends on the clock."""
    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    wanted = re.compile(r"step|tokens|lr|.*loss|.*bpb|grad_norm")
    return [{key: value for key, value in line.items() if wanted.fullmatch(key)} for line in lines]


def prepare_corpus(tree: Path) -> dict:
    Path("text.txt").write_text(TEXT, "utf-8")
    pairs = [json.dumps({"source": a, "target": b}) for a, b in zip(TEXT.splitlines(), TEXT.splitlines()[1:])]
    Path("pairs.jsonl").write_text("\n".join(pairs), "utf-8")
    encoder = ("--encoder", "text.enc", "--vocab_size", "300")
    run_script(tree, "prepare.py", "--input", "text.txt", "--output", "text.bin", *encoder)
    run_script(tree, "prepare.py", "--pairs", "pairs.jsonl", "--output", "pairs.bin", "--encoder", "text.enc")
    header = {"text.enc": 0, "text.bin": 256, "pairs.bin": 256}
    return {name: hashlib.sha256(Path(name).read_bytes()[size:]).hexdigest() for name, size in header.items()}


def probe_preset(tree: Path, name: str) -> dict:
    """A small run of one preset, its text, and the same run resumed from its checkpoint of step 10."""
    import json5

    given = json5.loads((tree / "config" / f"{name}.json").read_text("utf-8"))
    sizes = {key: value for key, value in SMALL.items() if key in given["model_hyperparams"]} | {"vocab_size": 320}
    sizes["n_head"] = 8 if given["model_hyperparams"].get("n_experts") else 4
    data = "pairs.bin" if "pairs" in given["dataset"]["path"] else "text.bin"
    keys = {**RUN, **{f"model_hyperparams.{key}": value for key, value in sizes.items()},
            "dataset.path": f"../{data}", "encoder_path": "../text.enc"}  # fmt: skip
    if "rope_scaling" in given["model_hyperparams"]:
        keys["model_hyperparams.rope_scaling.original_max_position"] = 32
    argv = ["--config", str(tree / "config" / f"{name}.json"), *(f"--{key}={value}" for key, value in keys.items())]
    run_script(tree, "train.py", *argv)
    found = {"numbers": numbers_in(Path("ck/metrics.jsonl")), "weights": weights_in(Path("model.file"))}
    prompt = ["--source", "the cat"] if "pairs" in name or "spans" in name else ["--prompt", "the"]
    if not name.endswith("masked"):
        sampling = ("--model", "model.file", "--length", "64", "--seed", "3", "--device", "cpu", "--temperature", "0.9")
        found["text"] = run_script(tree, "sample.py", *prompt, *sampling)[1]
    shutil.rmtree("ck/step_00000020")
    Path("ck/latest").unlink(missing_ok=True)
    Path("model.file").unlink()
    run_script(tree, "train.py", *argv, "--init_from=resume")
    found["resumed weights"] = weights_in(Path("model.file"))
    return found


def probe_case(hyperparams: dict) -> dict:
    """Loss, gradients and logits of one model, every parameter perturbed."""
    import torch

    import model

    torch.manual_seed(0)
    net = model.build(hyperparams)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    idx = torch.randint(hyperparams["vocab_size"] - 1, (2, hyperparams["block_size"] - 3))
    source = idx[:, :9].flip(1) if net.takes_source else None
    loss = net.train()(idx, idx.roll(-1, 1), source=source)[1]
    loss.backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    found = {"loss": loss.item(), "gradients": digest(gradients)}
    with torch.no_grad():
        found["logits"] = digest({"": net.eval()(idx, source=source)[0]})
        if net.causal:
            cache = net.new_cache(2, idx.size(1), source) if net.takes_source else net.new_cache(2, idx.size(1))
            parts = idx.split([20, 1, 1, idx.size(1) - 22], dim=1)
            found["cached"] = digest({str(i): net(part, cache=cache)[0] for i, part in enumerate(parts)})
    return found


def probe_file(tree: Path, path: Path) -> dict:
    argv = ("--model", str(path), "--prompt", "the", "--length", "48", "--temperature", "0", "--device", "cpu")
    return {"weights": weights_in(path), "text": run_script(tree, "sample.py", *argv)[1]}


def probe(tree: Path, wanted: dict, out: Path) -> None:
    """All that `wanted` names, in this folder, as {name: values}."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(tree))
    found = {}
    if wanted["presets"]:
        found["corpus"] = prepare_corpus(tree)
    for name in wanted["presets"]:
        Path(name).mkdir()
        with contextlib.chdir(name):
            found[name] = probe_preset(tree, name)
    for name, hyperparams in wanted["cases"].items():
        found[name] = probe_case(hyperparams)
    for path in wanted["files"]:
        found[path] = probe_file(tree, Path(path))
    out.write_text(json.dumps(found), "utf-8")


# ---- both trees -----------------------------------------------------------------------------------------------------


def list_cases(base: Path) -> dict:
    """{name: hyperparameters} of the base's test cases: of tests/helpers/cases.py, in earlier trees of
    tests/test_model.py."""
    module = "cases" if (base / "tests" / "helpers" / "cases.py").exists() else "test_model"
    code = f"import json, {module}; print(json.dumps({module}.CASES))"
    paths = os.pathsep.join(str(base / folder) for folder in (".", "tests", "tests/helpers"))
    # python -c looks for modules in the working directory first
    run = subprocess.run([sys.executable, "-c", code], cwd=base, env={**os.environ, "PYTHONPATH": paths},
                         capture_output=True, text=True)  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"{module}.CASES of {base} cannot be read: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def list_wanted(base: Path, only: list[str], match: str) -> dict:
    presets = sorted(p.stem for p in (base / "config").glob("*.json") if p.name != "schema.json")
    files = [*(TREE / "tests" / "fixtures").glob("*.tinystar"), *(TREE.parent / "shared" / "faults").glob("*.tinystar")]
    found = {"presets": presets, "cases": list_cases(base) if "cases" in only else {}, "files": sorted(map(str, files))}
    for part in PARTS:
        names = [name for name in found[part] if part in only and re.search(match, name)]
        found[part] = {name: found[part][name] for name in names} if part == "cases" else names
    return found


def compare(before: dict, after: dict) -> list[str]:
    """What differs, one line each."""
    found = []
    for name in before:
        for key, value in before[name].items():
            other = after.get(name, {}).get(key)
            if other != value:
                found.append(f"{name}: {key} was {str(value)[:160]} and is {str(other)[:160]}")
    return found


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="the commit to compare with")
    parser.add_argument("--only", choices=PARTS, action="append", help="probe this part alone; may be repeated")
    parser.add_argument("--match", default="", help="probe only names that this regular expression finds")
    parser.add_argument("--probe", nargs=3, metavar=("TREE", "WANTED", "OUT"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    given = parse_arguments(sys.argv[1:])
    if given.probe:
        tree, wanted, out = map(Path, given.probe)
        probe(tree, json.loads(wanted.read_text("utf-8")), out)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        base, folder = Path(folder) / "base", Path(folder)
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(base), given.base], cwd=TREE, check=True)
        try:
            wanted = list_wanted(base, given.only or list(PARTS), given.match)
            (folder / "wanted.json").write_text(json.dumps(wanted), "utf-8")
            found = [start_probe(tree, name, folder) for tree, name in ((base, "before"), (TREE, "after"))]
            if any(run.wait() for run in found):
                return 1
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(base)], cwd=TREE, check=True)
        before, after = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("before", "after"))
    different = compare(before, after)
    print("\n".join(different) or f"equal to the bit: {', '.join(f'{len(wanted[part])} {part}' for part in PARTS)}")
    return 1 if different else 0


def start_probe(tree: Path, name: str, folder: Path) -> subprocess.Popen:
    (folder / name).mkdir()
    words = [sys.executable, __file__, "--base", "-", "--probe", str(tree), str(folder / "wanted.json"),
             str(folder / f"{name}.json")]  # fmt: skip
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.Popen(words, cwd=folder / name, env={**alone, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    sys.exit(main())
