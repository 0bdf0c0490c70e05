"""A small server that speaks as vLLM does on /v1/models, /v1/completions and /health, and can misbehave on demand."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NextToken = Callable[[str, list[int]], tuple[int, float]]
"""Model name and all ids so far -> the next id and its log probability."""


class FakeVllm(ThreadingHTTPServer):
    """Serves ``base`` and its adapter ``tuned`` with the tokens that ``next_token`` chooses.

    faults: taken one a completion call, in order; what they are called in _Handler. window: max_model_len. spelled: ids
    -> text, for stop texts. bodies: what was asked. most: completions at once. broken: prompts whose client hung up.
    token_s: time per token.
    """

    daemon_threads = False

    def __init__(self, next_token: NextToken, spelled: Callable[[Sequence[int]], str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.next_token, self.spelled = next_token, spelled
        self.window: int | None = 1024
        self.key: str | None = None
        self.models: Any = None
        self.faults: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.broken: list[list[int]] = []
        self.tries = self.now = self.most = 0
        self.token_s = 0.0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeVllm

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def reply(self, status: int, body: Any, **headers: str) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def error(self, status: int, message: str, **headers: str) -> None:
        self.reply(status, {"error": {"message": message, "code": status}}, **headers)

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(200, "")
        elif self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.error(401, "Unauthorized")
        elif self.path == "/v1/models" and self.server.models is not None:
            self.reply(200, self.server.models)
        elif self.path == "/v1/models":
            base = {"id": "base", "parent": None, "max_model_len": self.server.window}
            self.reply(200, {"data": [base, {"id": "tuned", "parent": "base", "max_model_len": None}]})
        else:
            self.error(404, "Not Found")

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.tries += 1
            fault = server.faults.pop(0) if server.faults else ""
        if fault == "busy":
            self.error(503, "starting")
        elif fault == "later":
            self.error(429, "too many", Retry_After="0")
        elif fault == "cut":
            self.close_connection = True
        elif fault == "garbage":
            self.wfile.write(b"SSH-2.0-OpenSSH\r\n")
            self.close_connection = True
        elif fault == "html":
            self.reply(200, "<html>")
        elif fault == "shape":
            self.reply(200, {"choices": []})
        elif fault == "refused":
            self.error(400, "max_tokens is odd")
        else:
            with server.lock:
                server.bodies.append(body)
                server.now += 1
                server.most = max(server.most, server.now)
            self.counted = True
            try:
                (self.stream if body["stream"] else self.whole)(body, fault)
            except OSError:
                server.broken.append(body["prompt"])
            finally:
                self.ended()

    def ended(self) -> None:
        """Count the answer as done: before its last bytes go out, since the next request may come right after them."""
        with self.server.lock:
            self.server.now -= self.counted
            self.counted = False

    def choices(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """One choice a token, the last with its finish_reason."""
        ids: list[int] = []
        while True:
            if self.server.closing.wait(self.server.token_s):
                raise ConnectionAbortedError
            token, logprob = self.server.next_token(body["model"], body["prompt"] + ids)
            ids.append(token)
            text = self.server.spelled(ids)
            reason = "length" if len(ids) == body["max_tokens"] else None
            if token in body["stop_token_ids"] or any(stop in text for stop in body["stop"]):
                reason = "stop"
            choice = {"index": 0, "token_ids": [token], "finish_reason": reason, "logprobs": None}
            if len(ids) == 1:
                choice["prompt_token_ids"] = body["prompt"]
            if "logprobs" in body:
                choice["logprobs"] = {"token_logprobs": [logprob]}
            if reason:
                self.ended()
            yield choice
            if reason:
                return

    def whole(self, body: dict[str, Any], fault: str) -> None:
        parts = list(self.choices(body))
        choice = parts[-1] | {"token_ids": [part["token_ids"][0] for part in parts], "prompt_token_ids": body["prompt"]}
        if "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": [part["logprobs"]["token_logprobs"][0] for part in parts]}
        if fault == "no ids":
            del choice["token_ids"]
        if fault == "no logprobs":
            choice["logprobs"] = None
        if fault == "other prompt":
            choice["prompt_token_ids"] = [1, *body["prompt"]]
        if fault == "abort":
            choice["finish_reason"] = "abort"
        self.reply(200, {"choices": [choice]})

    def stream(self, body: dict[str, Any], fault: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.chunk(": keep-alive\n\n")
        for number, choice in enumerate(self.choices(body)):
            if fault == "half" and number == 2:
                self.close_connection = True
                return
            if fault == "gives up" and number == 2:
                self.chunk('data: {"error": {"message": "out of blocks"}}\n\n')
                break
            if fault == "no end" and number == 0:
                break
            self.chunk(f"data: {json.dumps({'choices': [choice]})}\n\n")
        self.chunk("data: [DONE]\n\n")
        self.chunk("")

    def chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text.encode()):x}\r\n{text}\r\n".encode())


@contextmanager
def fake_vllm(next_token: NextToken, spelled: Callable[[Sequence[int]], str]) -> Iterator[FakeVllm]:
    """Run a FakeVllm in a thread."""
    with FakeVllm(next_token, spelled) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
