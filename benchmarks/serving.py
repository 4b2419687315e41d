"""The server of `halfbyte serve` in a process of its own, asked over HTTP by the official `openai` client, which takes
about a millisecond of a core for each piece of an answer; `streams` by a bare connection, unless `--client openai`.

    python benchmarks/serving.py streams RUN [RUN]     # tokens/s of 1 and of 8 parallel streams, in turns
    python benchmarks/serving.py memory RUN [RUN]      # resident memory of the server over 1,000 requests
    python benchmarks/serving.py crowd RUN RUN         # 64 clients with hang-ups: each answer beside `generate`

`streams`: greedy answers (the base and the runs in turns), counted from the first request to the last token; so what
reading prompts takes is in it. A stream whose answer ends early asks again, until it has its number of tokens. One
stream is measured for each model, and together. `crowd`: answers are compared with those of `generate` alone, in
this process, before the server starts; a quarter of the clients hangs up, and who is refused comes again when told to.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measuring import say, verdict

LEAST_TIMES, CLIENTS, MOST_GROWTH = 3.0, 64, 0.02
STORIES = [f"Tell me a long story about {what}." for what in (
    "a lighthouse", "two bakers", "the sea", "an old clock", "a lost letter", "seven bridges", "a fox", "the moon",
)]  # fmt: skip
ORDERS = [f"Please send {n} {what} to {city} by Friday. Thanks, Ann" for n, what, city in (
    ("two", "blue mugs", "Madrid"), ("3x", "red shirts (M)", "Oslo"), ("nine", "scarves in black", "Chicago"),
    ("1", "green cap", "Rome"), ("four", "yellow shirts S", "Lima"), ("12", "white plates", "Kyoto"),
)]  # fmt: skip


@contextlib.contextmanager
def served(runs: list[str], *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """The server's address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "halfbyte", "serve", *runs, "--port", str(port), "-q", *options]
    child, url = subprocess.Popen(command, stdout=subprocess.DEVNULL), f"http://127.0.0.1:{port}"
    try:
        while not _is_up(url):
            if child.poll() is not None:
                sys.exit(f"the server ended with exit code {child.returncode}; what it said is above")
            time.sleep(0.2)
        yield url, psutil.Process(child.pid)
    finally:
        child.terminate()
        say(f"SIGTERM: the server ended with exit code {child.wait(60)}")


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)


async def names(client: openai.AsyncOpenAI) -> list[str]:
    return [model.id async for model in client.models.list()]


async def story(client: openai.AsyncOpenAI, model: str, number: int, most: int, lean: bool) -> tuple[int, float]:
    """Tokens of one streamed answer, and when the first came."""
    asked: dict[str, Any] = {
        "model": model, "messages": [{"role": "user", "content": STORIES[number % len(STORIES)]}], "max_tokens": most,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, tokens = time.perf_counter(), 0.0, 0
    if lean:
        async for line in _lines(client, json.dumps(asked).encode()):
            if b'"content": "' in line and b'"content": ""' not in line:
                first = first or time.perf_counter() - began
            elif b'"usage": {' in line:
                tokens = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]
        return tokens, first
    async for chunk in await client.chat.completions.create(**asked):
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        elif chunk.choices[0].delta.content:
            first = first or time.perf_counter() - began
    return tokens, first


async def _lines(client: openai.AsyncOpenAI, body: bytes) -> AsyncIterator[bytes]:
    """The lines of a streamed answer, by a bare connection."""
    url = client.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = f"POST {url.path}chat/completions HTTP/1.1\r\nHost: {url.host}:{url.port}\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    while line := await reader.readline():
        yield line
    writer.close()


async def filled(client: openai.AsyncOpenAI, model: str, number: int, most: int, lean: bool) -> tuple[int, float]:
    """Answers one after another, until there are so many tokens; and when the first came."""
    tokens, first = await story(client, model, number, most, lean)
    while tokens < most:
        number += 1
        tokens += (await story(client, model, number, most - tokens, lean))[0]
    return tokens, first


async def streams(url: str, most: int, rounds: int, lean: bool) -> dict[str, Any]:
    client, rows = client_of(url), list[dict[str, float]]()
    models = await names(client)
    for model in models:
        await asyncio.gather(*(story(client, model, number, 8, lean) for number in range(len(STORIES))))
    for _ in range(rounds):
        for count in (1, 8):
            began, made = time.perf_counter(), list[tuple[int, float]]()
            asked = [[model] for model in models] if count == 1 else [[models[i % len(models)] for i in range(count)]]
            for together in asked:
                made += await asyncio.gather(*(filled(client, name, i, most, lean) for i, name in enumerate(together)))
            seconds, tokens = time.perf_counter() - began, sum(n for n, _ in made)
            rows.append({"streams": count, "tokens": tokens, "seconds": seconds, "rate": tokens / seconds})
            say(f"{count} streams: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s; "
                f"the last first token after {max(f for _, f in made):.2f} s")  # fmt: skip
    await client.close()
    one, eight = (statistics.median(r["rate"] for r in rows if r["streams"] == n) for n in (1, 8))
    verdict("8 streams, times 1", eight / one, LEAST_TIMES, at_least=True)
    return {"rows": rows, "times": eight / one}


async def memory(url: str, process: psutil.Process, count: int) -> dict[str, Any]:
    """Resident memory after each tenth of the requests, of which the first settles caches and compiled code."""
    client, seen = client_of(url), list[float]()
    models, gate = await names(client), asyncio.Semaphore(16)

    async def one(number: int) -> None:
        async with gate:
            options: Any = {
                "model": models[number % len(models)], "max_tokens": 4 + number % 13, "temperature": number % 2,
                "messages": [{"role": "user", "content": ORDERS[number % 6] + " please" * (number % 40)}],
            }  # fmt: skip
            if number % 3:
                await client.chat.completions.create(**options)
                return
            async for _ in await client.chat.completions.create(**options, stream=True):
                if number % 4 == 0:
                    break

    for tenth in range(11):
        await asyncio.gather(*(one(tenth * count // 10 + i) for i in range(count // 10)))
        seen.append(process.memory_info().rss / 1e6)
        say(f"after {(tenth + 1) * count // 10:5d} requests: {seen[-1]:.1f} MB")
    await client.close()
    verdict(f"growth over {count} requests after the first {count // 10}", seen[-1] / seen[0] - 1, MOST_GROWTH)
    return {"rss_mb": seen}


def expected(runs: list[str], most: int) -> dict[tuple[str, str], str]:
    """What `generate` gives for each model and order, one after another."""
    from halfbyte.inference.generate import chat_ids, generate
    from halfbyte.serving import models
    from halfbyte.serving import names as naming
    from halfbyte.writing.sampling import SamplingParams

    opened = models.open_all(naming.find(runs, ()))
    answers = {}
    for name, model in opened.by_name.items():
        with opened.using(model.adapter):
            for order in ORDERS:
                ids = chat_ids(model.tokenizer, [{"role": "user", "content": order}])
                (answers[name, order],) = generate(opened.model, model.tokenizer, [ids], SamplingParams(most))
    return answers


async def crowd(url: str, wanted: dict[tuple[str, str], str], most: int) -> dict[str, Any]:
    client, counted = client_of(url), dict.fromkeys(("right", "wrong", "gone", "full", "failed"), 0)
    asked, flying, at_429 = list(wanted), set[int](), list[int]()

    async def one(number: int) -> None:
        flying.add(number)
        name, order = asked[number % len(asked)]
        options: Any = {
            "model": name, "messages": [{"role": "user", "content": order}], "temperature": 0, "max_tokens": most,
        }  # fmt: skip
        try:
            if number % 4 == 3:
                stream = await client.chat.completions.create(**options, stream=True)
                async for _ in stream:
                    break
                await stream.close()
                counted["gone"] += 1
                return
            if number % 2:
                parts = [c.choices[0].delta.content or "" async for c in
                         await client.chat.completions.create(**options, stream=True)]  # fmt: skip
                text = "".join(parts)
            else:
                text = (await client.chat.completions.create(**options)).choices[0].message.content or ""
            counted["right" if text == wanted[name, order] else "wrong"] += 1
            if text != wanted[name, order]:
                say(f"{name}: {text!r}\n  for {wanted[name, order]!r}")
        except openai.RateLimitError as full:
            counted["full"] += 1
            at_429.append(len(flying))
            flying.remove(number)
            await asyncio.sleep(float(full.response.headers["Retry-After"]))
            await one(number)
        except openai.OpenAIError as error:
            counted["failed"] += 1
            say(f"failed: {error}")
        finally:
            flying.discard(number)

    gate = asyncio.Semaphore(CLIENTS)

    async def in_turn(number: int) -> None:
        async with gate:
            await one(number)

    await asyncio.gather(*(in_turn(number) for number in range(2 * CLIENTS)))
    await client.close()
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        gauges = dict(re.findall(r"^(halfbyte_\w+) ([\d.]+)$", answer.read().decode(), re.MULTILINE))
    if at_429:
        say(f"429 with Retry-After where there were {min(at_429)} to {max(at_429)} requests at once")
    say(f"{counted}; gauges { ({k: v for k, v in gauges.items() if 'waiting' in k or 'running' in k}) }")
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("streams", "memory", "crowd"))
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queue", type=int, default=256, help="texts that may wait; 16 are written at once")
    parser.add_argument("--client", choices=("lean", "openai"), default="lean", help="of `streams`")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    wanted = expected(args.runs, args.tokens) if args.what == "crowd" else {}
    with served(args.runs, "--queue", str(args.queue), "--context", "1024") as (url, process):
        made = asyncio.run(
            streams(url, args.tokens, args.rounds, args.client == "lean") if args.what == "streams"
            else memory(url, process, args.requests) if args.what == "memory"
            else crowd(url, wanted, args.tokens)
        )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
