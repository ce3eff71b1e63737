"""The least that the application needs of Gunicorn; production uses the platform's configuration."""

from prometheus_client import multiprocess

worker_class = "uvicorn_worker.UvicornWorker"
control_socket_disable = True
graceful_timeout = 20
# The socket's mode is the trust: whoever may connect is the proxy.
forwarded_allow_ips = "*"


def child_exit(_server: object, worker: object) -> None:
    """Forget the gauges of a worker that ended."""
    multiprocess.mark_process_dead(worker.pid)  # type: ignore[attr-defined, no-untyped-call]
