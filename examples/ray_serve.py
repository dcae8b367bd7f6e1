"""Several machines behind Ray Serve: on each, one replica with all that `zipmoe serve` answers.

    pip install 'zipmoe[serve]' 'ray[serve]'
    ray start --head                     # and on the others: ray start --address=...
    python examples/ray_serve.py /data/my-store --memory 8GB --replicas 2

The store must lie at the same path on a local drive of every machine. Clients talk to port 8000 of
any of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

from ray import serve

import zipmoe
from zipmoe.serve.api import build
from zipmoe.serve.limits import Limits
from zipmoe.serve.service import Service
from zipmoe.streams import Streams

LIMITS = Limits()


@serve.deployment(
    max_ongoing_requests=LIMITS.streams + LIMITS.queue,
    health_check_period_s=5,
    graceful_shutdown_timeout_s=LIMITS.grace,
)
@serve.ingress()
class Replica:
    """A model that is loaded and served. Ray starts another one when this one's process ends."""

    def __init__(self, store: str, memory: str | None, context: int | None) -> None:
        self._loaded = zipmoe.load(
            store, memory=memory, context=context, conversations=2, streams=LIMITS.streams
        )
        self._service = Service(self._loaded, Streams(self._loaded), Path(store).name, LIMITS)

    def __serve_build_asgi_app__(self) -> Any:
        """Give Ray Serve what answers requests."""
        log = logging.getLogger("ray.serve")
        return build(
            self._service, lambda line: log.info(json.dumps(line)), key=None, is_local=False
        )

    def check_health(self) -> None:
        """Have this replica replaced when its loop has failed; a drive may recover by itself."""
        status, reason = self._service.scheduler.status()
        if status == "broken":
            raise RuntimeError(reason)

    def __del__(self) -> None:
        """End what is left."""
        self._service.close()
        self._loaded.close()


def application(
    store: str, *, memory: str | None, context: int | None, replicas: int, each_node: int | None = 1
) -> serve.Application:
    """Make what `serve.run` runs. each_node: most replicas on one machine; None: no limit."""
    deployment = Replica.options(num_replicas=replicas, max_replicas_per_node=each_node)
    return deployment.bind(store, memory, context)


def main() -> None:
    """Deploy, and stay until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("store")
    parser.add_argument("--memory", help="of each replica; below that of the machine")
    parser.add_argument("--context", type=int)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines connect")
    options = parser.parse_args()
    serve.start(http_options={"host": options.host, "location": "EveryNode"})
    serve.run(
        application(
            options.store,
            memory=options.memory,
            context=options.context,
            replicas=options.replicas,
        )
    )
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
