"""A scripted server with OpenAI's chat-completions interface, in this process."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Answers each request with the next of `script`, then always with the last.

    An entry is a status, a text that is sent as it is, or ("said", words of the judge).
    """

    def __init__(self):
        self.script, self.requests = [("said", "[[A]]")], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, self.headers.get("Authorization"), None))
                self.reply(200, json.dumps({"data": [{"id": "first-model"}, {"id": "second"}]}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, self.headers.get("Authorization"), body))
                step = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                if isinstance(step, int):
                    self.reply(step, '{"error": "no such thing"}', {"Location": f"{outer.url}/elsewhere"})
                elif isinstance(step, str):
                    self.reply(200, step)
                else:
                    self.reply(200, json.dumps({"choices": [{"message": {"content": step[1]}}]}))

            def reply(self, status, text, headers=None):
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@contextmanager
def serving():
    """A server that answers while the block runs."""
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        thread.join()
        server.http.server_close()
