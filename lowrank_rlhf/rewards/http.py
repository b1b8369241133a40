"""A reward server: rollouts go to a URL, scores come back, one request per batch that was generated."""

import json
import socket
import urllib.request
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any
from urllib.parse import SplitResult, urlsplit

from lowrank_rlhf.data import Example, Renderer, Sequence
from lowrank_rlhf.errors import UserError
from lowrank_rlhf.http_json import JsonServer
from lowrank_rlhf.rewards.scored import Overlap, Scored, checked_scores, plain_texts

TOKEN = "LOWRANK_RLHF_REWARD_TOKEN"
TIMEOUT_SECONDS, REACH_SECONDS = 60.0, 10.0


class ServerReward:
    """POST {"prompts": […], "completions": […], "columns": {name: […]}} → {"scores": […]}, one number per completion.

    A bearer token comes from $LOWRANK_RLHF_REWARD_TOKEN; busy and failing servers are asked four times.

    Args:
        url: http or https, of the endpoint itself.

    Raises:
        UserError: at once where nobody listens there; later where scores do not come back. It names the URL.
    """

    overlap: Overlap = "generation"

    def __init__(self, url: str, renderer: Renderer):
        self.url, self.renderer = url, renderer
        self.server = JsonServer("reward", TOKEN, TIMEOUT_SECONDS)
        self._reach()

    def __call__(self, examples: SequenceOf[Example], sequences: SequenceOf[Sequence]) -> Scored:
        texts = plain_texts(examples, sequences, self.renderer)
        self._check_columns(texts.columns)
        answer = self.server.ask(self.url, texts._asdict())
        if not isinstance(answer, dict) or "scores" not in answer:
            raise self.server.error(self.url, 'sent no {"scores": […]}', json.dumps(answer).encode())
        return checked_scores(answer["scores"], len(sequences), self.url)

    def check(self, examples: SequenceOf[Example]) -> None:
        """Before any rollout: every row's columns can be sent.

        Raises:
            UserError: one cannot; names the row.
        """
        for e in examples:
            try:
                self._check_columns(e.columns)
            except UserError as error:
                raise UserError(f"{e.where}: {error}") from error

    def _check_columns(self, columns: Mapping[str, Any]) -> None:
        for name, values in columns.items():
            try:
                json.dumps(values, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise self.server.error(self.url, f"cannot be sent the column {name!r}: {error}") from error

    def _reach(self) -> None:
        """A wrong address shows now, not after the first rollout."""
        try:
            parts = urlsplit(self.url)
            host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise self.server.error(self.url, f"is no address: {error}") from error
        if "@" in parts.netloc:
            raise UserError(f"reward: leave user and password out of the URL; a token is read from ${TOKEN}")
        if not host:
            raise self.server.error(self.url, "is no address: it names no host")
        if not _has_proxy(parts):  # else only the proxy can be reached from here
            try:
                socket.create_connection((host, port), REACH_SECONDS).close()
            except (OSError, UnicodeError) as error:
                raise self.server.error(self.url, f"cannot be reached: {error}; is the server started?") from error


def _has_proxy(parts: SplitResult) -> bool:
    return parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.netloc)
