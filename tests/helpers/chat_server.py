"""A chat endpoint on this machine that answers, and fails as it is told."""

import contextlib
import http.server
import json
import threading
import time

GOOD = "good"
# What a server may do instead of answering. "text" is a reply that `garble` spoils.
FAULTS = ("429", "500", "half", "no json", "text", "silence")
TOKENS = 42  # of a request and its answer


class ChatServer(http.server.ThreadingHTTPServer):
    """Answers chat requests with `answer(messages)`.

    `fault(n)` says what becomes of the n-th request, from 0 on: GOOD, one of FAULTS, or an HTTP
    status and a message. `log` has for each request what it was about (`name(messages)`) and what
    became of it.
    """

    daemon_threads = True

    def __init__(
        self, answer, *, fault=lambda n: GOOD, name=str, silence=30.0, delay=0.0, tokens=TOKENS
    ):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.fault, self.name = answer, fault, name
        self.silence, self.delay, self.tokens = silence, delay, tokens
        self.log: list[tuple[str, str]] = []
        self.bodies: list[dict] = []
        self.keys: set[str] = set()
        self.most = self.busy = 0  # requests at the same time
        self.lock, self.closing = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that was killed, or gave up waiting, is no error."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            what = server.fault(len(server.log))
            server.log.append((server.name(body["messages"]), what))
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            server.busy += 1
            server.most = max(server.most, server.busy)
        try:
            time.sleep(server.delay)
            self._answer(what, body["messages"])
        finally:
            with server.lock:
                server.busy -= 1

    def _answer(self, what, messages):
        if what == "silence":
            self.server.closing.wait(self.server.silence)
            self.close_connection = True
        elif what[:3].isdigit():
            error = {"error": {"message": f"stub {what}", "code": None}}
            self._send(int(what[:3]), json.dumps(error))
        elif what == "no json":
            self._send(200, '{"choices": [{"message": {"content": "It')
        else:
            text = self.server.answer(messages) if what != "text" else "Question:\nWhat? 9"
            message = {"role": "assistant", "content": text}
            reply = json.dumps(
                {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": "stub",
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                    "usage": {"total_tokens": self.server.tokens},
                }
            )
            self._send(200, reply, half=what == "half")

    def _send(self, status, text, half=False):
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if half:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if half else content)
        self.close_connection = half

    def log_message(self, *message):
        pass


@contextlib.contextmanager
def chat_server(answer, **options):
    """Runs a `ChatServer` in threads until the block ends."""
    server = ChatServer(answer, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
