"""`bench.py serve`: tokens/s of serve.py for many simultaneous clients, next to a server without batching."""

import argparse
import concurrent.futures
import contextlib
import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import encoder as encoders
from strawberry.argument_parser import ArgumentParser
from strawberry.bench import hardware
from strawberry.bench.common import ROOT, parse_count, parse_quantity
from strawberry.bench.decode import ROUNDS, read_model_sources
from strawberry.common import UserError
from strawberry.device import choose_device
from strawberry.model_file import save_model


class ServerProcess:
    """A context manager that runs serve.py as a child process with one model."""

    def __init__(self, folder: Path, name: str, rows: int, arguments: argparse.Namespace):
        self.name, self.rows = name, rows
        program = str(ROOT / "serve.py")
        options = {"models": folder, "port": 0, "rate": 0, "batch": rows, "queue": arguments.queue, "memory": 1e6,
                   "data": tempfile.mkdtemp(dir=folder), "device": arguments.device}  # fmt: skip
        self.command = [sys.executable, program, *(f"--{option}={value}" for option, value in options.items())]

    def __enter__(self):
        self.child = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        lines = []
        for line in self.child.stderr:
            lines.append(line)
            if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
                threading.Thread(target=self.child.stderr.read, daemon=True).start()  # drain the pipe
                return self
        self.__exit__()
        raise UserError(f"serve.py did not start: {''.join(lines[-3:]).strip()}")

    def __exit__(self, *error):
        self.child.terminate()
        self.child.wait()

    def request_completion(self, seed: int, arguments: argparse.Namespace) -> tuple[int, str, int]:
        """(status, text, generated tokens) of one completion. Each seed has its own prompt. Raises UserError for a
        status other than 200 or 429.
        """
        prompt = [(seed * 7919 + i * 104729) % 256 for i in range(arguments.prompt)]
        body = {"model": self.name, "prompt": prompt, "max_tokens": arguments.tokens, "seed": seed}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = json.loads(answer.read())
        if answer.status == 429 and int(answer.getheader("Retry-After")) > 0:
            return 429, "", 0
        if answer.status != 200:
            raise UserError(f"the server answered {answer.status}: {content['error']['message']}")
        return 200, content["choices"][0]["text"], content["usage"]["completion_tokens"]

    def request_all_at_once(self, arguments: argparse.Namespace) -> tuple[float, list[tuple[int, str, int]]]:
        """(tokens/s, the result of each client) of simultaneous requests."""
        with concurrent.futures.ThreadPoolExecutor(arguments.clients) as pool:
            began = time.perf_counter()
            answers = list(pool.map(lambda seed: self.request_completion(seed, arguments), range(arguments.clients)))
            seconds = time.perf_counter() - began
        return sum(tokens for _, _, tokens in answers) / seconds, answers


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        "bench.py serve",
        "Measure the tokens/s of serve.py for simultaneous clients, beside a server without batching, and compare each "
        "text with the one that its client gets alone.",
    )
    add = parser.add_argument
    add("model", help="config file (file.json:key=value,key=value changes keys) or trained model file")
    add("--clients", type=parse_count, default=16, help="simultaneous clients (default 16)")
    add("--rows", type=parse_quantity, default=16, help="texts that are generated at once (default 16)")
    add("--queue", type=parse_quantity, default=64, help="clients that may wait (default 64)")
    add("--prompt", type=parse_quantity, default=32, help="tokens of a prompt (default 32)")
    add("--tokens", type=parse_quantity, default=128, help="tokens to generate (default 128)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: cuda, else mps, else cpu")
    return parser.parse_args(argv)


def run(argv: list[str]) -> None:
    """Measure how fast serve.py serves many clients at once, and whether each gets its own text."""
    arguments = parse_arguments(argv)
    source = read_model_sources([arguments.model])[0]
    with tempfile.TemporaryDirectory() as folder:
        model = source.make()
        name = f"{re.sub(r'[^a-zA-Z0-9_.-]', '_', source.label)}.{model.config.arch}"
        save_model(Path(folder, name), model, encoders.train(["x"], 258), {})
        batch = ServerProcess(Path(folder), name, arguments.rows, arguments)
        single = ServerProcess(Path(folder), name, 1, arguments)
        with batch, single:
            print(f"{source.label}, {hardware.describe_device(choose_device(arguments.device))}", flush=True)
            alone = [batch.request_completion(seed, arguments)[1] for seed in range(arguments.clients)]
            single.request_completion(0, arguments)
            found = [
                (single.request_all_at_once(arguments), batch.request_all_at_once(arguments)) for _ in range(ROUNDS)
            ]
    print(format_result(found, alone, arguments))


def format_result(found: list[tuple], alone: list[str], arguments: argparse.Namespace) -> str:
    """The result as text: tokens/s without and with batching, and the number of texts equal to the text of a request
    alone.
    """
    ratios = [batched[0] / single[0] for single, batched in found]
    slow, fast = (statistics.median(speed for speed, _ in column) for column in zip(*found, strict=True))
    answers = [answer for _, (_, answers) in found for answer in enumerate(answers)]
    served = [(seed, text) for seed, (status, text, _) in answers if status == 200]
    same = sum(text == alone[seed] for seed, text in served)
    return (
        f"{arguments.clients} clients at once, {arguments.tokens} tokens each: {slow:,.0f} tokens/s a text at a "
        f"time, {fast:,.0f} with {arguments.rows} rows, {statistics.median(ratios):.1f} times as many "
        f"({min(ratios):.1f} to {max(ratios):.1f})\n{len(served)} of {len(answers)} requests were served, "
        f"{len(answers) - len(served)} answered with status 429; {same} of the {len(served)} texts are exactly those "
        "that their clients get alone"
    )
