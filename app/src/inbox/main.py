"""The ASGI application for a server: `inbox.main:app`."""

import logging
import sys

from inbox import logs
from inbox.application import create_app
from inbox.settings import SettingsInvalid

# What Gunicorn and uvicorn call a worker that cannot boot. With any other number Gunicorn starts the next one for ever.
_BOOT_FAILED = 3

try:
    app = create_app()
except SettingsInvalid as invalid:
    logs.configure("INFO")
    for problem in invalid.problems:
        logging.getLogger(__name__).critical("invalid setting: %s", problem)
    sys.exit(_BOOT_FAILED)
