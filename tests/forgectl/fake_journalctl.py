#!/usr/bin/env python3
"""Stands in for journalctl: the same options, over entries that a host's own has printed."""

import json
import os
import re
import sys
from pathlib import Path

options = dict(each.partition("=")[::2] for each in sys.argv[1:] if each.startswith("--"))
fields = [each.partition("=")[::2] for each in sys.argv[1:] if re.match(r"[A-Z_]+=", each)]
lines = Path(os.environ["CAPTURED"]).read_text().splitlines()
if "--reverse" in options:
    lines.reverse()
found = 0
for line in lines:
    entry = json.loads(line)
    at = int(entry["__REALTIME_TIMESTAMP"]) / 1e6
    if not float(options.get("--since", "@0")[1:]) <= at <= float(options.get("--until", "@inf")[1:]):
        continue
    if fields and not any(str(entry.get(name)) == value for name, value in fields):
        continue
    pattern = options.get("--unit", "").replace("*", ".*")
    if pattern and not re.fullmatch(r"inbox[@.].*\.service", str(entry.get("_SYSTEMD_UNIT"))):
        continue
    if "--priority" in options and int(entry["PRIORITY"]) > 3:
        continue
    wanted = options.get("--grep", "")
    if wanted and not re.search(wanted, str(entry["MESSAGE"]), re.IGNORECASE if wanted.islower() else 0):
        continue
    found += 1
    print(line, flush=True)
sys.exit(0 if found else 1)
