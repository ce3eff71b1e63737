"""The last day of an app as four plots, drawn as SVG that stretches with the page; its words are the page's text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from markupsafe import Markup

from .answers import AppDay, Day

# Of the drawing, which is stretched to whatever room there is; lines keep their width.
WIDTH, HEIGHT = 288.0, 100.0
HOVER_STEPS = 12
# The height of one error among very many.
LEAST_BAR = 0.5
TICK_HOURS = 4
NICE = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
MIB = 1024 * 1024
ENDED_BADLY = ("failed", "rolled back")

Series = Sequence[float | None]


@dataclass(frozen=True)
class Plot:
    """One plot: its heading, the figures in words, its axis from the top down, and what is drawn."""

    title: str
    figures: str
    axis: tuple[str, str, str]
    legend: tuple[tuple[str, str], ...]
    drawing: Markup


@dataclass(frozen=True)
class Picture:
    """The plots of an app, the hours under them, and what happened that day, the newest first."""

    plots: tuple[Plot, ...]
    hours: tuple[tuple[str, str], ...]
    """Where each is, in percent of the width, and the time of day."""
    happened: tuple[tuple[str, str, str, str], ...]
    note: str


def picture(day: Day, app: AppDay) -> Picture:
    """Draw an app's day."""
    begun, at = datetime.fromisoformat(day.begun), datetime.fromisoformat(day.at)
    scene = _Scene(begun, timedelta(seconds=day.step), len(app.requests), app)
    complete = datetime.fromisoformat(app.complete_from)
    late = complete > begun
    return Picture(
        (_requests(scene, at), _latency(scene), _errors(scene), _memory(scene)),
        tuple((_number(100 * scene.x_of(each.isoformat()) / WIDTH), f"{each:%H:%M}") for each in scene.hours),
        tuple(
            (_clock(each.at, begun), each.action, each.release or "-", each.outcome) for each in reversed(app.happened)
        ),
        f"Requests before {complete:%H:%M} are not counted: their logs were too large, or are gone." if late else "",
    )


@dataclass(frozen=True)
class _Scene:
    begun: datetime
    step: timedelta
    steps: int
    app: AppDay

    @property
    def hours(self) -> list[datetime]:
        """Every fourth hour of the host's clock."""
        midnight = self.begun.replace(hour=0, minute=0, second=0, microsecond=0)
        end = self.begun + self.steps * self.step
        every = (midnight + number * timedelta(hours=TICK_HOURS) for number in range(2 * 24 // TICK_HOURS + 1))
        return [each for each in every if self.begun <= each <= end]

    def x(self, number: float) -> float:
        return number * WIDTH / max(1, self.steps)

    def x_of(self, at: str) -> float:
        return min(WIDTH, max(0.0, self.x((datetime.fromisoformat(at) - self.begun) / self.step)))

    def drawing(self, label: str, shapes: Markup, tell: Callable[[int, int], str]) -> Markup:
        """The shapes over the grid, under what marks the releases and what tells the figures."""
        parts = [
            Markup('<svg viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">').format(
                _number(WIDTH), _number(HEIGHT), label
            ),
            self._grid(),
            self._unread(),
            shapes,
            *self._marks(),
            *self._hover(tell),
            Markup("</svg>"),
        ]
        return Markup("").join(parts)

    def _grid(self) -> Markup:
        down = "".join(f"M{_number(self.x_of(each.isoformat()))} 0v{_number(HEIGHT)}" for each in self.hours)
        across = "".join(f"M0 {_number(y)}h{_number(WIDTH)}" for y in (0.0, HEIGHT / 2, HEIGHT))
        return Markup('<path class="grid" d="{}"/>').format(down + across)

    def _unread(self) -> Markup:
        width = self.x_of(self.app.complete_from)
        if not width:
            return Markup("")
        return Markup('<rect class="unread" x="0" y="0" width="{}" height="{}"/>').format(
            _number(width), _number(HEIGHT)
        )

    def _marks(self) -> Iterator[Markup]:
        for each in self.app.happened:
            x = self.x_of(each.at)
            yield _line("bad mark" if each.outcome in ENDED_BADLY else "mark", x, 0, x, HEIGHT)

    def _hover(self, tell: Callable[[int, int], str]) -> Iterator[Markup]:
        yield Markup('<g class="hover">')
        for first in range(0, self.steps, HOVER_STEPS):
            last = min(self.steps, first + HOVER_STEPS)
            span = f"{self.begun + first * self.step:%H:%M} to {self.begun + last * self.step:%H:%M}"
            left, right, down = map(_number, (self.x(first), self.x(last), HEIGHT))
            yield Markup('<path d="M{} 0H{}V{}H{}z"><title>{}</title></path>').format(
                left, right, down, left, f"{span}: {tell(first, last)}"
            )
        yield Markup("</g>")


def _requests(scene: _Scene, at: datetime) -> Plot:
    seconds = [scene.step.total_seconds()] * scene.steps
    # The last step is not over.
    seconds[-1] = max(60.0, (at - scene.begun - (scene.steps - 1) * scene.step).total_seconds())
    rates = [count / length for count, length in zip(scene.app.requests, seconds, strict=True)]
    top, total = _top(rates), sum(scene.app.requests)

    def tell(first: int, last: int) -> str:
        return f"{_rate(sum(scene.app.requests[first:last]) / sum(seconds[first:last]))} requests/s"

    figures = f"{total:,} in all, up to {_rate(max(rates))}/s"
    drawn = _area("requests", scene, rates, top) + _path("requests", scene, rates, top)
    label = f"Requests a second: {figures}"
    return Plot("Requests/s", figures, _axis(top, _rate), (), scene.drawing(label, drawn, tell))


def _latency(scene: _Scene) -> Plot:
    app = scene.app
    top = _top([*app.p50, *app.p95, *app.p99])
    series = (("p99", app.p99), ("p95", app.p95), ("p50", app.p50))
    medians, slowest = [each for each in app.p50 if each is not None], [each for each in app.p99 if each is not None]

    def tell(first: int, last: int) -> str:
        most = [(name, [each for each in values[first:last] if each is not None]) for name, values in series]
        return ", ".join(f"{name} up to {_seconds(max(values))}" for name, values in most if values) or "no request"

    figures = "no request"
    if medians:
        figures = f"p50 {_seconds(sorted(medians)[len(medians) // 2])}, p99 up to {_seconds(max(slowest))}"
    drawn = Markup("").join(_path(name, scene, values, top) for name, values in series)
    legend = tuple((name, name) for name, _ in reversed(series))
    return Plot("Latency", figures, _axis(top, _seconds), legend, scene.drawing(f"Latency: {figures}", drawn, tell))


def _errors(scene: _Scene) -> Plot:
    refused, failed = scene.app.answers.get("4xx", []), scene.app.answers.get("5xx", [])
    both = [first + second for first, second in zip(refused, failed, strict=True)]
    top = _top(both)

    def tell(first: int, last: int) -> str:
        return f"{sum(failed[first:last])} x 5xx, {sum(refused[first:last])} x 4xx"

    figures = f"{sum(failed):,} x 5xx, {sum(refused):,} x 4xx"
    drawn = _bars("e4xx", scene, both, top) + _bars("e5xx", scene, failed, top)
    legend = (("e5xx", "5xx"), ("e4xx", "4xx"))
    label = f"Errors in five minutes: {figures}"
    return Plot("Errors in 5 min", figures, _axis(top, _count), legend, scene.drawing(label, drawn, tell))


def _memory(scene: _Scene) -> Plot:
    used = [None if each is None else each / MIB for each in scene.app.memory]
    known, limit = [each for each in used if each is not None], scene.app.memory_limit / MIB
    top = _top([*used, limit])

    def tell(first: int, last: int) -> str:
        values = [each for each in used[first:last] if each is not None]
        return f"up to {max(values):.0f} MiB" if values else "not measured"

    figures = "not measured"
    if known:
        figures = f"{known[-1]:.0f} MiB now, up to {max(known):.0f}" + (f" of {limit:.0f} MiB" if limit else "")
    drawn = _area("memory", scene, used, top) + _path("memory", scene, used, top)
    if limit:
        drawn += _line("limit", 0, _y(limit, top), WIDTH, _y(limit, top))
    legend = (("limit", "limit"),) if limit else ()
    return Plot("Memory", figures, _axis(top, _mib), legend, scene.drawing(f"Memory: {figures}", drawn, tell))


def _runs(values: Series) -> Iterator[tuple[int, list[float]]]:
    """What stands together between two gaps, and where it begins."""
    run: list[float] = []
    for number, value in enumerate([*values, None]):
        if value is not None:
            run.append(value)
        elif run:
            yield number - len(run), run
            run = []


class _Pen:
    """A path in as few characters as there can be, since a page has many: each point says how far it is from the last.

    What is rounded is the place of each, so that nothing adds up.
    """

    def __init__(self) -> None:
        self.drawn = ""
        self._x, self._y = 0.0, 0.0
        self._how = ""

    def move(self, x: float, y: float) -> None:
        """Begin anew."""
        self._x, self._y = _placed(x, y)
        self.drawn += f"M{_number(self._x)},{_number(self._y)}"
        self._how = ""

    def line(self, x: float, y: float) -> None:
        """Go on."""
        x, y = _placed(x, y)
        across, down = _number(x - self._x), _number(y - self._y)
        self._x, self._y = x, y
        if down in ("0", "-0"):
            # Between bars that are as high there is no way.
            if across not in ("0", "-0"):
                self._add("h", across)
        elif across in ("0", "-0"):
            self._add("v", down)
        else:
            self._add("l", across, down)

    def _add(self, how: str, *ways: str) -> None:
        if how != self._how:
            self.drawn += how
            self._how = how
        for way in ways:
            # A minus parts numbers as well as a space does.
            self.drawn += way if self.drawn.endswith(how) or way.startswith("-") else f" {way}"

    def close(self) -> None:
        """Go back to where it began."""
        self.drawn += "z"


def _placed(x: float, y: float) -> tuple[float, float]:
    """Where a point is drawn: half a unit down is less than a pixel."""
    return round(x, 1), round(2 * y) / 2


def _path(name: str, scene: _Scene, values: Series, top: float) -> Markup:
    """A line; one value between two gaps is a short one."""
    pen = _Pen()
    for first, run in _runs(values):
        for number, value in enumerate(run):
            (pen.line if number else pen.move)(scene.x(first + number + 0.5), _y(value, top))
        if len(run) == 1:
            pen.line(scene.x(first + 1), _y(run[0], top))
    return _shape("line", name, pen)


def _area(name: str, scene: _Scene, values: Series, top: float) -> Markup:
    pen = _Pen()
    for first, run in _runs(values):
        pen.move(scene.x(first + 0.5), HEIGHT)
        for number, value in enumerate(run):
            pen.line(scene.x(first + number + 0.5), _y(value, top))
        pen.line(scene.x(first + len(run) - 0.5), HEIGHT)
        pen.close()
    return _shape("area", name, pen)


def _bars(name: str, scene: _Scene, values: Sequence[int], top: float) -> Markup:
    """The outline of the bars that stand together."""
    pen = _Pen()
    for first, run in _runs([value or None for value in values]):
        pen.move(scene.x(first), HEIGHT)
        for number, value in enumerate(run):
            # However few there are among many, they are seen.
            high = min(_y(value, top), HEIGHT - LEAST_BAR)
            pen.line(scene.x(first + number), high)
            pen.line(scene.x(first + number + 1), high)
        pen.line(scene.x(first + len(run)), HEIGHT)
        pen.close()
    return _shape("bars", name, pen)


def _shape(kind: str, name: str, pen: _Pen) -> Markup:
    return Markup('<path class="{} {}" d="{}"/>').format(kind, name, pen.drawn) if pen.drawn else Markup("")


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<path class="{}" d="M{},{} L{},{}"/>').format(name, *map(_number, (x1, y1, x2, y2)))


def _y(value: float, top: float) -> float:
    return HEIGHT - min(1.0, value / top) * HEIGHT


def _top(values: Series) -> float:
    """A number that an axis can end with, a little above the largest value."""
    most = max((value for value in values if value is not None), default=0.0)
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next((nice * power for nice in NICE if nice * power >= most * 1.02), 10 * power * NICE[1])


def _axis(top: float, word: Callable[[float], str]) -> tuple[str, str, str]:
    return word(top), word(top / 2), "0"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.3g}"


def _count(value: float) -> str:
    return f"{value:,.3g}" if value < 10 else f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def _mib(value: float) -> str:
    return f"{value:.0f} MiB" if value < 1024 else f"{value / 1024:.3g} GiB"


def _clock(at: str, begun: datetime) -> str:
    """A time of day in the host's zone, as the axis has it."""
    return f"{datetime.fromisoformat(at).astimezone(begun.tzinfo):%H:%M}"
