"""An S3 server on this machine, which the real client talks to."""

import contextlib
import logging
import os
import urllib.request
from collections.abc import Iterator
from unittest import mock

import fsspec
from moto.server import ThreadedMotoServer

from tests.helpers.ports import free_port

KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """A server with the bucket `bucket`; yields what the environment of its clients needs.

    One at a time: clients keep its address.
    """
    port = free_port()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    reset = urllib.request.Request(f"http://127.0.0.1:{port}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()  # what a server of this process held before
    environment = KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    try:
        with mock.patch.dict(os.environ, environment):
            fsspec.get_filesystem_class("s3").clear_instance_cache()  # of a server before it
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
            yield environment
    finally:
        server.stop()
