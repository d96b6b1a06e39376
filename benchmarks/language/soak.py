"""Many streaming clients against one server for some minutes, a part of which leave early."""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

__all__ = ["Load", "Traffic", "answers", "slope", "soak", "unfinished"]

_COMPLETIONS = "/v1/completions"
_LONGEST_REQUEST_S = 120
_BLOCK_S = 15
"""Memory is averaged over so many seconds before a line is fitted: neighbours are alike."""
_METRIC = re.compile(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} ([\d.e+-]+)$", re.M)


@dataclass(frozen=True)
class Load:
    """What is sent to a server.

    Attributes:
        prompts: texts that clients choose from.
        clients: connections at once, each with one request after the other.
        seconds: no request begins later.
        leaving: every so many-th client closes its connection in the middle of every answer.
        tokens: the shortest and the longest answer.
    """

    prompts: Sequence[str]
    clients: int = 64
    seconds: float = 360
    leaving: int = 3
    tokens: tuple[int, int] = (16, 128)


@dataclass
class Traffic:
    """What came of it.

    Attributes:
        whole: answers that were received whole.
        left: answers whose client left in the middle.
        tokens: tokens of whole answers.
        errors: one line for each request that failed.
    """

    whole: int = 0
    left: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)

    def count(self, received: int | None, wanted: int) -> None:
        """Count an answer of `received` tokens; None if its client left."""
        if received is None:
            self.left += 1
        elif received != wanted:
            self.errors.append(f"{received} tokens instead of {wanted}")
        else:
            self.whole += 1
            self.tokens += received


def soak(url: str, load: Load) -> Traffic:
    """Send the load to the server at `url` and return what came of it.

    Raises:
        TimeoutError: if clients are not done long after the last request began.
    """
    traffic = Traffic()

    async def run() -> None:
        end = time.monotonic() + load.seconds
        limit = load.seconds + 2 * _LONGEST_REQUEST_S
        async with httpx.AsyncClient(
            base_url=url,
            timeout=_LONGEST_REQUEST_S,
            limits=httpx.Limits(max_connections=load.clients),
            trust_env=False,
        ) as http:
            clients = (_client(http, load, number, end, traffic) for number in range(load.clients))
            await asyncio.wait_for(asyncio.gather(*clients), limit)

    asyncio.run(run())
    return traffic


def answers(url: str, prompts: Sequence[str], salt: str, tokens: int) -> list[Any]:
    """Tokens and log-probabilities of greedy answers, one request after the other.

    Args:
        url: of the server.
        prompts: texts.
        salt: separates these requests from the cache of earlier ones.
        tokens: of each answer.
    """
    found = []
    with httpx.Client(base_url=url, timeout=_LONGEST_REQUEST_S, trust_env=False) as client:
        for prompt in prompts:
            body = {"prompt": prompt, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
            body |= {"logprobs": 1, "cache_salt": salt}
            answer = client.post(_COMPLETIONS, json=body).raise_for_status()
            logprobs = answer.json()["choices"][0]["logprobs"]
            found.append([logprobs["tokens"], logprobs["token_logprobs"]])
    return found


def unfinished(url: str, seconds: float) -> int:
    """Requests that the server still computes or holds after at most so many `seconds`."""
    deadline = time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=_LONGEST_REQUEST_S, trust_env=False) as client:
        while True:
            counts = _METRIC.findall(client.get("/metrics").raise_for_status().text)
            if not counts:
                raise ValueError("the server's metrics do not name its requests")
            left = int(sum(map(float, counts)))
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.5)


def slope(seconds: Sequence[float], sizes: Sequence[float]) -> tuple[float, float]:
    """Slope and its standard error of a line through averages of blocks, in size per second.

    Raises:
        ValueError: if there are fewer than three blocks.
    """
    blocks: dict[int, list[tuple[float, float]]] = {}
    for second, size in zip(seconds, sizes, strict=True):
        blocks.setdefault(int((second - seconds[0]) // _BLOCK_S), []).append((second, size))
    x = [statistics.fmean(second for second, _ in block) for block in blocks.values()]
    y = [statistics.fmean(size for _, size in block) for block in blocks.values()]
    if len(x) < 3:
        raise ValueError(f"{len(x)} blocks of {_BLOCK_S} s; a line with its error takes three")
    line = statistics.linear_regression(x, y)
    residuals = [b - line.intercept - line.slope * a for a, b in zip(x, y, strict=True)]
    spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
    error = (sum(r * r for r in residuals) / (len(x) - 2) / spread) ** 0.5
    return line.slope, error


async def _client(
    http: httpx.AsyncClient, load: Load, number: int, end: float, traffic: Traffic
) -> None:
    """One request after the other, at least one."""
    draw = random.Random(number)
    leaves = number % load.leaving == 0
    while True:
        tokens = draw.randint(*load.tokens)
        body = {  # no seed: with one, vLLM 0.32 on a CPU ends at the first prompt in two parts
            "prompt": draw.choice(load.prompts),
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        parts = draw.randint(1, 8) if leaves else None
        try:
            received = await _request(http, body, parts)
        except (httpx.HTTPError, ValueError, LookupError) as error:
            traffic.errors.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.1)  # a server that is gone refuses at once
        else:
            traffic.count(received, tokens)
        if time.monotonic() >= end:
            return


async def _request(http: httpx.AsyncClient, body: dict[str, Any], parts: int | None) -> int | None:
    """The number of tokens that the server counts; None if the client left after `parts` parts.

    Raises:
        httpx.HTTPError: if the server refuses or ends the connection.
        ValueError: if the answer ends without its mark, or holds an error.
    """
    tokens, seen = 0, 0
    async with http.stream("POST", _COMPLETIONS, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line:
                continue
            text = line.removeprefix("data: ")
            if text == "[DONE]":
                return tokens
            part = json.loads(text)
            if "error" in part:
                raise ValueError(f"the server answered {part['error']}")
            tokens = (part.get("usage") or {}).get("completion_tokens", tokens)
            seen += 1
            if parts is not None and seen >= parts:
                return None
    raise ValueError("the answer ended without [DONE]")
