"""A `vllm serve` process: started, waited for, queried over HTTP, and always stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

__all__ = ["Server", "ServerError", "serve_command", "serve_environment"]

_START_SECONDS = 900
_STOP_SECONDS = 60
_KILL_SECONDS = 10
_SHOWN_LINES = 12
# an exception, or the line behind it in which pydantic gives the reason
_FAULT = re.compile(r"\b(?:[A-Z]\w*(?:Error|Exception): |Value error, ).*")
_CONSEQUENCE = (
    "Engine core initialization failed"  # vLLM's API server logs this after any such fault
)


class ServerError(RuntimeError):
    """The server did not start or did not answer; one sentence and the end of its log."""


def serve_command(model: Path | str, *arguments: str) -> list[str]:
    """`vllm serve MODEL ...` of the environment this Python runs in."""
    return [str(Path(sys.executable).parent / "vllm"), "serve", str(model), *arguments]


def serve_environment() -> dict[str, str]:
    """The environment of a server that downloads nothing and reports nothing."""
    environment = dict(os.environ)
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", PATH=path)
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default is a share of all RAM
    return environment


class Server:
    """A server, running inside a ``with`` block.

    Args:
        model: directory of the checkpoint.
        log: file that receives the server's output.
        arguments: further arguments of `vllm serve`.
        variables: environment variables beside those of `serve_environment`.
    """

    def __init__(
        self, model: Path, log: Path, *arguments: str, variables: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        self.port = _free_port()
        self._command = serve_command(
            model, "--host", "127.0.0.1", "--port", str(self.port), *arguments
        )
        self._variables = dict(variables or {})
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=600, trust_env=False
        )

    def __enter__(self) -> Server:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=serve_environment() | self._variables,
                start_new_session=True,  # its workers too can then be stopped as one group
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server and its workers; kill those that do not end in time, or if interrupted.

        Raises:
            ServerError: if something still listens on its port.
        """
        self._client.close()
        group = self._process.pid  # it leads its own session
        try:
            self._end(group, signal.SIGTERM, _STOP_SECONDS)
        finally:
            self._end(group, signal.SIGKILL, _KILL_SECONDS)
            self._process.wait()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                raise ServerError(
                    f"the server was stopped, but a process still listens on port {self.port}; "
                    "find and end that process"
                )

    def complete(self, prompt: str, **options: Any) -> str:
        """The greedy continuation of a text, by POST /v1/completions.

        Raises:
            ServerError: if the server refuses or does not answer.
        """
        return str(self.completion(prompt, **options)["text"])

    def completion(self, prompt: str | list[int], **options: Any) -> dict[str, Any]:
        """POST /v1/completions; the first choice of the answer.

        Raises:
            ServerError: if the server refuses or does not answer.
        """
        return self._choice("/v1/completions", {"prompt": prompt, **options})

    def chat(self, question: str, **options: Any) -> str:
        """The greedy answer to a user's message, by POST /v1/chat/completions.

        Raises:
            ServerError: if the server refuses or does not answer.
        """
        messages = [{"role": "user", "content": question}]
        choice = self._choice("/v1/chat/completions", {"messages": messages, **options})
        return str(choice["message"]["content"])

    def _choice(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._client.post(path, json={"temperature": 0, **body})
        except httpx.HTTPError as error:
            raise ServerError(f"the server did not answer ({error}){self._log_end()}") from None
        if answer.status_code != httpx.codes.OK:
            raise ServerError(
                f"the server answered {answer.status_code}: {answer.text[:300]}{self._log_end()}"
            )
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice

    def wait_until_ready(self) -> None:
        """Return as soon as the server answers.

        Raises:
            ServerError: if it ends before, or takes longer than a quarter of an hour.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                code = self._process.returncode
                raise ServerError(f"vllm serve ended with status {code}{self._log_end()}")
            try:
                if self._client.get("/health", timeout=5).status_code == httpx.codes.OK:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise ServerError(f"vllm serve was not ready after {_START_SECONDS} s{self._log_end()}")

    def _log_end(self) -> str:
        """The last fault that the log names, and the log's last lines."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        faults = [
            found[0] for line in lines if _CONSEQUENCE not in line if (found := _FAULT.search(line))
        ]
        reason = f" ({faults[-1]})" if faults else ""
        shown = "\n".join(f"    {line}" for line in lines[-_SHOWN_LINES:])
        return f"{reason}; the end of {self.log}:\n{shown}"

    def _end(self, group: int, signal_number: int, seconds: float) -> None:
        """Signal the whole group, if there is one left, and wait until it is gone."""
        deadline = time.monotonic() + seconds
        try:
            os.killpg(group, signal_number)
            while time.monotonic() < deadline:
                self._process.poll()
                os.killpg(group, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
