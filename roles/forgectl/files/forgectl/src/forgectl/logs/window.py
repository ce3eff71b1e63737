"""From when on something is shown."""

import re
from datetime import datetime, timedelta

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
EXPECTED = "expected 90s, 15m, 2h, 1d, 03:00, 2026-01-31 or 2026-01-31T03:00, the last ones in this host's time zone"


def since(text: str, now: datetime) -> float:
    """The Unix time that a person means: so long ago, or a point in time. `now` is aware of its zone.

    Raises:
        ValueError: it is neither, or has not come yet.
    """
    text = text.strip()
    if re.fullmatch(r"(\d+[smhdw])+", text):
        try:
            ago = timedelta()
            for number, unit in re.findall(r"(\d+)([smhdw])", text):
                ago += timedelta(**{UNITS[unit]: int(number)})
            return max(0.0, (now - ago).timestamp())
        except OverflowError:
            raise ValueError(f"{EXPECTED}; found {text!r}, which is before all time") from None
    try:
        if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", text):
            hour, *rest = text.split(":")
            text = f"{now:%Y-%m-%d}T{':'.join([hour.zfill(2), *rest])}"
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{EXPECTED}; found {text!r}") from None
    if at.tzinfo is None:
        # What the zone was at that time, and not what it is now.
        at = at.astimezone()
    if at > now:
        raise ValueError(f"expected a time that has come; found {text}; name a date as well")
    return at.timestamp()


def clock(at: float) -> str:
    """A Unix time for a person, in this host's time zone, to the millisecond."""
    return f"{datetime.fromtimestamp(at).astimezone():%H:%M:%S.%f}"[:-3]


def stamp(at: float) -> str:
    """A Unix time for a program: RFC 3339, with the offset of this host's zone."""
    return datetime.fromtimestamp(at).astimezone().isoformat(timespec="milliseconds")
