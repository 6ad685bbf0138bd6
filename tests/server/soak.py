"""Hours of a server's life in minutes: ``python -m tests.server.soak 2000``.

Clients ask at once for prompts of 1 to 2,000 tokens, whole and streamed, hang up, send rubbish and
too much, and the server is ended and started again in between, now politely and now not. Every
answer is compared with that of a fresh server that was asked one thing at a time, and when all is
quiet the memory in use is that of the model and of the caches that are kept.

A batch rounds otherwise than a single request, so that two tokens of nearly the same probability
may change places: prompts are asked for as many tokens as are clear, by a margin of 0.05 in the
logarithm of the two likeliest.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from mlx_delta.loading import find_model
from mlx_delta.measure.text import BUNDLED_TEXT, read_text

MARGIN = 0.05
LONGEST = 2000
ANSWER = 10


@dataclass(frozen=True)
class Sample:
    """A prompt, and what a quiet server answers."""

    prompt: list[int]
    text: list[str]  # of its clear tokens, one after another


@dataclass
class Server:
    """Where the server is; ``end`` ends it, and ``memory`` counts its bytes where it can."""

    root: str
    end: Callable[[bool], None]
    pid: int | None = None
    patience: float = 120  # seconds for an answer; more on a machine that has other things to do

    def post(self, body: Any, **options: Any) -> requests.Response:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return requests.post(
            self.root + "/v1/completions", data=raw, timeout=self.patience, **options
        )

    def stats(self) -> dict[str, Any]:
        return requests.get(self.root + "/stats", timeout=self.patience).json()

    def resident(self) -> int:
        """Bytes of the process in memory; 0 where the system does not say."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            return 0
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def start(flags: list[str], patience: float = 120) -> Server:
    """A server in a process of its own."""
    command = [sys.executable, "-m", "mlx_delta.server", "--port", "0", "--log-level", "ERROR"]
    child = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True)
    line = child.stdout.readline()
    root = line.split(" at ")[-1].strip().removesuffix("/v1")
    assert root.startswith("http"), f"the server does not start: {line!r}"

    def end(politely: bool) -> None:
        child.send_signal(signal.SIGTERM if politely else signal.SIGKILL)
        status = child.wait(patience)
        assert not politely or status == 0, f"the server ended with {status}"

    return Server(root, end, child.pid, patience)


def make_prompts(model: str, count: int, longest: int, seed: int) -> list[list[int]]:
    """Begins of a few texts, so that many of them begin alike, and some that change midway."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(find_model(model) / "tokenizer.json"))
    book = tokenizer.encode(read_text(BUNDLED_TEXT)[:120_000], add_special_tokens=False).ids
    draw = random.Random(seed)
    texts = [book[at : at + longest] for at in draw.sample(range(len(book) - longest), 4)]
    prompts = []
    for i in range(count):
        length = {0: 1, 1: longest}.get(i) or max(1, round(longest ** draw.random()))
        text, other = draw.choice(texts), draw.choice(texts)
        cut = length if i % 3 else length // 2
        prompts.append((text[:cut] + other[cut:])[:length])
    return prompts


def ask_quietly(server: Server, prompts: list[list[int]]) -> list[Sample]:
    """What the server answers to one after another; prompts without a clear answer are left out."""
    samples = []
    for prompt in prompts:
        body = {"prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "logprobs": 2}
        found = server.post(body).json()["choices"][0]["logprobs"]
        clear = 0
        for top in found["top_logprobs"]:
            values = sorted(top.values(), reverse=True)
            if len(values) < 2 or values[0] - values[1] < MARGIN:
                break
            clear += 1
        if clear:
            samples.append(Sample(prompt, found["tokens"][:clear]))
    return samples


class Storm:
    """Clients that do all there is to do, and what came of it.

    Args:
        samples: Prompts with their answers.
        context: Of the model, in tokens.
        seed: Of what is done.
    """

    def __init__(self, samples: list[Sample], context: int, seed: int):
        self.samples, self.context, self.seed = samples, context, seed
        self.counts: Counter[str] = Counter()
        self.cached = 0
        self.faults: list[str] = []
        self._lock = threading.Lock()

    def blow(self, server: Server, requests_: int, clients: int) -> None:
        """Make so many requests by so many clients at once."""
        left = iter(range(requests_))
        self.seed += 1

        def client(number: int) -> None:
            draw = random.Random(f"{self.seed} {number}")
            while True:
                with self._lock:
                    if next(left, None) is None:
                        return
                self._one(server, draw)

        threads = [threading.Thread(target=client, args=[i]) for i in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _one(self, server: Server, draw: random.Random) -> None:
        kinds = {
            self._whole: 36,
            self._stream: 30,
            self._cancel: 12,
            self._vanish: 5,
            self._rubbish: 6,
            self._oversize: 3,
            self._too_long: 4,
            self._stranger: 4,
        }
        (kind,) = draw.choices(list(kinds), list(kinds.values()))
        try:
            fault = kind(server, draw)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        with self._lock:
            self.counts[kind.__name__.strip("_")] += 1
            if fault:
                self.faults.append(f"{kind.__name__}: {fault}")

    def _body(self, draw: random.Random, **more: Any) -> tuple[dict[str, Any], str]:
        sample = draw.choice(self.samples)
        tokens = draw.randint(1, len(sample.text))
        body = {"prompt": sample.prompt, "max_tokens": tokens, "temperature": 0, **more}
        return body, "".join(sample.text[:tokens])

    def _whole(self, server: Server, draw: random.Random) -> str | None:
        body, text = self._body(draw)
        answer = server.post(body).json()
        self.cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        return _differs(answer["choices"][0]["text"], text, body)

    def _stream(self, server: Server, draw: random.Random) -> str | None:
        body, text = self._body(draw, stream=True)
        with server.post(body, stream=True) as response:
            found = "".join(_pieces(response))
        return _differs(found, text, body)

    def _cancel(self, server: Server, draw: random.Random) -> str | None:
        """Hang up after a few pieces: what came until then is right."""
        body, text = self._body(draw, stream=True)
        body["max_tokens"] = 200
        found = ""
        with server.post(body, stream=True) as response:
            for i, piece in enumerate(_pieces(response)):
                found += piece
                if i >= draw.randint(0, 3):
                    break
        known = min(len(found.lstrip(" ")), len(text.lstrip(" ")))
        return _differs(found.lstrip(" ")[:known], text.lstrip(" ")[:known], body)

    def _vanish(self, server: Server, draw: random.Random) -> str | None:
        """Hang up before anything came."""
        raw = json.dumps(self._body(draw)[0]).encode()
        host, _, port = server.root.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), server.patience) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(raw)}\r\n\r\n"
            connection.sendall((head.encode() + raw)[: draw.randint(1, len(raw) + 60)])
        return None

    def _rubbish(self, server: Server, draw: random.Random) -> str | None:
        bodies = [b"{", b"\xff", b"[]", b'{"prompt": 3}', b'{"prompt": "a", "max_tokens": -1}']
        return _status(server.post(draw.choice(bodies)), 400)

    def _oversize(self, server: Server, draw: random.Random) -> str | None:
        return _status(server.post(b" " * (10 << 20)), 413)

    def _too_long(self, server: Server, draw: random.Random) -> str | None:
        return _status(server.post({"prompt": [5] * (self.context + 1)}), 400)

    def _stranger(self, server: Server, draw: random.Random) -> str | None:
        return _status(server.post({**self._body(draw)[0], "model": "another"}), 404)


def _differs(found: str, text: str, body: dict[str, Any]) -> str | None:
    if found.lstrip(" ") == text.lstrip(" "):  # mlx-lm leaves a text's first space out
        return None
    return f"to {len(body['prompt'])} tokens {found!r} and not {text!r}"


def _status(response: requests.Response, wanted: int) -> str | None:
    message = response.json()["error"]["message"]
    return None if response.status_code == wanted else f"{response.status_code}: {message}"


def _pieces(response: requests.Response) -> Iterator[str]:
    """The texts of a stream."""
    for line in response.iter_lines():
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            yield event["choices"][0]["text"]


def quiet_bytes(server: Server) -> tuple[int, int]:
    """MLX's bytes and the process's, once nothing is going on; kept caches are none of MLX's."""
    end = time.monotonic() + server.patience
    while (stats := server.stats())["running"] or stats["requests"]:
        assert time.monotonic() < end, f"requests do not end: {stats}"
        time.sleep(0.05)
    return stats["active_bytes"], server.resident()


def soak(
    open_server: Callable[[], Server],
    samples: list[Sample],
    count: int,
    every: int,
    clients: int,
    context: int,
    seconds: float,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Storm:
    """Blow until so many requests were made, or the time is over; returns what came of it."""
    storm, made, begun, leg = Storm(samples, context, seed), 0, time.monotonic(), 0
    while made < count and time.monotonic() - begun < seconds:
        server = open_server()
        own, _ = quiet_bytes(server)
        for part in range(4):  # of a server's life
            number = min(every // 4, count - made)
            if number <= 0 or time.monotonic() - begun > seconds:
                break
            storm.blow(server, number, clients)
            made += number
            active, resident = quiet_bytes(server)
            say(
                f"{made:6} requests, {time.monotonic() - begun:4.0f} s, life {leg + 1}.{part + 1}: "
                f"MLX {(active - own) / 1e6:+.2f} MB beside the model, process "
                f"{resident / 1e6:.0f} MB, {len(storm.faults)} faults"
            )
            for fault in storm.faults[:: max(1, len(storm.faults) // 5)]:
                say(f"    {fault}")
            if active - own > 2_000_000:
                storm.faults.append(f"{active - own} bytes are left over")
        server.end(leg % 2 == 0)
        leg += 1
    return storm


def main() -> int:
    """Run it; the status is 1 if an answer was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="What stands after -- are flags of the server."
    )
    parser.add_argument("count", type=int, nargs="?", default=2000, help="Requests")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--every", type=int, default=500, help="Requests of a server's life")
    parser.add_argument("--clients", type=int, default=8, help="Requests at one time")
    parser.add_argument("--prompts", type=int, default=60, help="Different prompts")
    parser.add_argument("--longest", type=int, default=LONGEST, help="Tokens of the longest")
    parser.add_argument("--seconds", type=float, default=36_000, help="Begin no more after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--patience", type=float, default=120, help="Seconds for an answer, on a busy machine"
    )
    own = list(itertools.takewhile(lambda flag: flag != "--", sys.argv[1:]))
    args = parser.parse_args(own)
    flags = ["--model", args.model, *sys.argv[len(own) + 2 :]]
    begun = time.monotonic()
    quiet = start([*flags, "--prompt-cache-size", "0"], args.patience)
    context = requests.get(quiet.root + "/v1/models", timeout=args.patience).json()["data"][0]
    prompts = make_prompts(args.model, args.prompts, args.longest, args.seed)
    samples = ask_quietly(quiet, prompts)
    quiet.end(True)
    lengths = sorted(len(sample.prompt) for sample in samples)
    print(
        f"{len(samples)} prompts of {lengths[0]} to {lengths[-1]} tokens, "
        f"{time.monotonic() - begun:.0f} s",
        flush=True,
    )
    storm = soak(
        lambda: start(flags, args.patience),
        samples,
        args.count,
        args.every,
        args.clients,
        context["context_length"],
        args.seconds,
        args.seed,
        say=lambda text: print(text, flush=True),
    )
    kinds = ", ".join(f"{n} {name}" for name, n in storm.counts.most_common())
    print(f"{sum(storm.counts.values())} requests ({kinds}); {storm.cached} with a cached begin")
    for fault in storm.faults[:20]:
        print(fault)
    print(f"{len(storm.faults)} faults")
    return int(bool(storm.faults))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
