"""The live picture: a ``RunView`` as lines for a terminal of a given size. Decides what is shown and what gives way
when there is little room; draws nothing itself and asks no clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import msgspec
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.text import Text

from engine.monitor.sentences import REPLICA_WORDS, number, printable
from engine.monitor.view import ActorView, Notice, RunView, Shares

LABEL_WIDTH = 12
_MIN_WIDTH, _MAX_WIDTH = 60, 140


class Glyphs(msgspec.Struct, frozen=True, kw_only=True):
    """Signs for bars. The three kinds of time differ in shape, not only in colour."""

    worked: str
    waited_input: str
    waited_room: str
    full: str
    empty: str
    steps: str
    """Low to high, of a sparkline."""
    arrow: str
    dash: str


UNICODE = Glyphs(
    worked="█",
    waited_input="░",
    waited_room="▒",
    full="■",
    empty="·",
    steps="▁▂▃▄▅▆▇█",
    arrow="→",
    dash="─",
)
ASCII = Glyphs(
    worked="#",
    waited_input=".",
    waited_room="~",
    full="#",
    empty=".",
    steps="_.-=+*%#",
    arrow="->",
    dash="-",
)

# Of the sixteen colours that every terminal theme, light or dark, keeps readable.
STYLE_WORKED, STYLE_INPUT, STYLE_ROOM = "green", "yellow", "magenta"
STYLE_LABEL, STYLE_QUIET, STYLE_LOUD = "cyan", "bright_black", "bold"
_LEVEL_STYLES = {"warning": "yellow", "error": "bold red"}
_PHASE_STYLES = {"failed": "bold red", "waiting for the teacher": "bold yellow", "draining": "yellow"}


class Picture:
    """A rich renderable of ``view`` as it is when it is drawn.

    ``height`` rows at most: notices, then the latest answer, then blank lines give way first.
    """

    def __init__(self, view: RunView, *, now: float, height: int) -> None:
        self._view = view
        self._now = now
        self._height = height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(_MIN_WIDTH, min(options.max_width, _MAX_WIDTH))
        glyphs = ASCII if options.ascii_only else UNICODE
        yield Group(*lines(self._view, now=self._now, width=width, height=self._height, glyphs=glyphs))


def lines(view: RunView, *, now: float, width: int, height: int, glyphs: Glyphs = UNICODE) -> list[Text]:
    """The picture, top to bottom, none wider than ``width`` cells and no more than ``height`` of them."""
    blocks = [
        _head(view, now, width, glyphs),
        _numbers(view, width, glyphs),
        _actors(view, width, glyphs),
        _teachers(view),
        _answer(view),
        _notices(view),
    ]
    picture = _fit(blocks, height)
    for line in picture:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis" if glyphs is UNICODE else "crop")
    return picture


def _fit(blocks: Sequence[list[Text]], height: int) -> list[Text]:
    head, numbers, actors, teachers, answer, notices = blocks
    needed = len(head) + len(numbers) + len(actors) + len(teachers)
    room = height - needed
    notices = notices[-max(0, min(5, room - len(answer) - 5)) :] if room - len(answer) > 5 else notices[-1:]
    chosen = [head, numbers, actors + teachers]
    if answer and room >= len(answer) + len(notices):
        chosen.append(answer)
    if notices and room >= len(notices):
        chosen.append(notices)
    spare = height - sum(map(len, chosen))
    out: list[Text] = []
    for index, block in enumerate(block for block in chosen if block):
        if index and spare > 0:
            out.append(Text())
            spare -= 1
        out += block
    return out[:height]


def _head(view: RunView, now: float, width: int, glyphs: Glyphs) -> list[Text]:
    steps = f"/{view.steps}" if view.steps else ""
    left = Text()
    left.append(view.run or "run", style=STYLE_LOUD)
    left.append(f"   step {view.step}{steps}   version {view.live_version} is live   ")
    left.append(view.phase, style=_PHASE_STYLES.get(view.phase, STYLE_WORKED))
    elapsed_s = view.elapsed_s if view.ended or view.started_at is None else max(0.0, now - view.started_at)
    remaining_s = view.remaining_s(now)
    right = f"{clock(elapsed_s)} elapsed" + (f"  {clock(remaining_s)} left" if remaining_s is not None else "")
    left.append(" " * max(1, width - left.cell_len - len(right)) + right)
    share = view.step / view.steps if view.steps else 0.0
    done = round(share * width)
    progress = Text("━" * done if glyphs is UNICODE else "=" * done, style=STYLE_WORKED)
    progress.append(glyphs.dash * (width - done), style=STYLE_QUIET)
    return [left, progress]


def _numbers(view: RunView, width: int, glyphs: Glyphs) -> list[Text]:
    return [
        _loss(view, width, glyphs),
        _held_out(view, glyphs),
        _tokens(view),
        _staleness(view, width, glyphs),
        _rollouts(view),
    ]


def _loss(view: RunView, width: int, glyphs: Glyphs) -> Text:
    line = _label("KL" if view.objective.endswith("kl") else "loss")
    if not view.losses:
        line.append("after the first step", style=STYLE_QUIET)
        return line
    line.append(f"{number(view.losses[-1]):<7}", style=STYLE_LOUD)
    line.append("nats/token  ")
    line.append(sparkline(view.losses, width - line.cell_len, glyphs), style=STYLE_LABEL)
    return line


def _held_out(view: RunView, glyphs: Glyphs) -> Text:
    line = _label("held-out KL")
    if not view.evaluations:
        line.append("being measured" if view.is_measuring else "not measured yet", style=STYLE_QUIET)
        return line
    first, last = view.evaluations[0], view.evaluations[-1]
    line.append(_from_to(first.kl, last.kl, glyphs), style=STYLE_LOUD)
    line.append(" nats/token")
    if last.reference_nll is not None and first.reference_nll is not None:
        line.append("   references ")
        line.append(_from_to(first.reference_nll, last.reference_nll, glyphs), style=STYLE_LOUD)
    line.append(f"   version {last.version}", style=STYLE_QUIET)
    return line


def _tokens(view: RunView) -> Text:
    trained, sampled = view.tokens_per_s()
    line = _label("tokens/s")
    line.append(f"{_rate(trained)} trained   {_rate(sampled)} sampled")
    if view.slots is not None:
        running, _, slots = view.slots
        line.append(f"   {running} of {slots} slots busy")
    line.append(f"   {int(view.trained_tokens.total):,} trained in all", style=STYLE_QUIET)
    return line


def _staleness(view: RunView, width: int, glyphs: Glyphs) -> Text:
    line = _label("staleness")
    total = view.ages.total()
    if not total:
        line.append("after the first step", style=STYLE_QUIET)
    else:
        ages = sorted(view.ages)
        if len(ages) > 6:  # a row of numbers that nobody could tell apart
            line.append(f"mean {sum(a * n for a, n in view.ages.items()) / total:.2f}, max {ages[-1]} versions")
        else:
            room = max(4, (width - LABEL_WIDTH - 16 - 9 * len(ages)) // len(ages))
            for age in ages:
                share = view.ages[age] / total
                line.append(f"{age} ")
                line.append(glyphs.worked * max(1, round(share * min(room, 16))), style=STYLE_LABEL)
                line.append(f" {share:.0%}   ")
    if view.max_staleness is not None:
        line.append(f"{'' if line.plain.endswith(' ') else '   '}at most {view.max_staleness}", style=STYLE_QUIET)
    return line


def _rollouts(view: RunView) -> Text:
    states = view.rollouts_by_state()
    line = _label("rollouts")
    line.append(f"{states['sampling']} sampling   {states['at teacher']} at teacher   {states['scored']} scored   ")
    line.append(f"{states['in step']} in step   {view.totals['trained']} trained")
    if view.faults.rollouts_failed:
        line.append(f"   {view.faults.rollouts_failed} failed", style="yellow")
    return line


def _actors(view: RunView, width: int, glyphs: Glyphs) -> list[Text]:
    columns = _columns(view, width)
    title = Text()
    title.append(glyphs.worked, style=STYLE_WORKED).append(" works  ")
    title.append(glyphs.waited_input, style=STYLE_INPUT).append(" no input  ")
    title.append(glyphs.waited_room, style=STYLE_ROOM).append(" no room")
    _pad(title, columns.waits_at).append("waits for", style=STYLE_QUIET)
    _pad(title, columns.channel_at).append("channel", style=STYLE_QUIET)
    return [title, *(_actor(view, actor, columns, glyphs) for actor in view.actors.values())]


class _Columns(msgspec.Struct, frozen=True, kw_only=True):
    """Where the columns of the actors' table begin, in cells."""

    name: int
    bar_at: int
    bar: int
    waits_at: int
    waits: int
    channel_at: int
    channel_name: int
    fill: int


def _columns(view: RunView, width: int) -> _Columns:
    name = min(20, max((len(actor.name) for actor in view.actors.values()), default=0))
    channel_name = min(16, max((len(actor.produces or "") for actor in view.actors.values()), default=0))
    waits, fill, percent = len("room at ") + name, 5, 5
    bar_at = name + 2
    bar_width = max(6, min(40, width - bar_at - percent - 2 - waits - 2 - channel_name - fill - 9))
    waits_at = bar_at + bar_width + percent + 2
    return _Columns(
        name=name,
        bar_at=bar_at,
        bar=bar_width,
        waits_at=waits_at,
        waits=waits,
        channel_at=waits_at + waits + 2,
        channel_name=channel_name,
        fill=fill,
    )


def _actor(view: RunView, actor: ActorView, columns: _Columns, glyphs: Glyphs) -> Text:
    row = Text().append(_clip(actor.name, columns.name), style=STYLE_LABEL)
    _pad(row, columns.bar_at)
    if actor.state in ("running", "draining", "stopped") and view.training_since is not None:
        shares = view.recent_shares(actor) if view.ended is None else view.overall_shares(actor)
        row.append_text(bar(shares, columns.bar, glyphs))
        row.append(f" {shares.worked:>4.0%}")
        _pad(row, columns.waits_at).append(_clip(_waits(view, actor, shares), columns.waits))
    else:
        row.append(actor.state, style="bold red" if actor.state == "failed" else "")
    if actor.produces is not None:
        _pad(row, columns.channel_at).append(_clip(actor.produces, columns.channel_name), style=STYLE_QUIET)
        _pad(row, columns.channel_at + columns.channel_name + 1)
        row.append_text(_fill(view, actor.produces, columns.fill, glyphs))
    return row


def _waits(view: RunView, actor: ActorView, shares: Shares) -> str:
    if shares.worked > 0.98:
        return ""
    giver, taker = view.waits_for(actor)
    return f"room at {taker}" if shares.waited_room > shares.waited_input else giver


def _fill(view: RunView, name: str, width: int, glyphs: Glyphs) -> Text:
    text = Text()
    channel = view.channels.get(name)
    if channel is None or not channel.max_items:
        return text
    filled = min(width, -(-channel.items * width // channel.max_items))  # rounded up: one item is visible
    text.append(glyphs.full * filled, style=STYLE_ROOM if channel.items >= channel.max_items else STYLE_LABEL)
    text.append(glyphs.empty * (width - filled), style=STYLE_QUIET)
    return text.append(f" {channel.items}/{channel.max_items}", style=STYLE_QUIET)


def _pad(text: Text, width: int) -> Text:
    return text.append(" " * max(1, width - text.cell_len))


def _teachers(view: RunView) -> list[Text]:
    if not view.replicas:
        return []
    line = _label("teacher")
    away = {name: state for name, state in view.replicas.items() if state != "closed"}
    if len(view.replicas) > 3:
        line.append(f"{len(view.replicas) - len(away)} of {len(view.replicas)} replicas up   ")
    for name, state in (away if len(view.replicas) > 3 else view.replicas).items():
        line.append(f"{name} ")
        style = STYLE_WORKED if state == "closed" else "bold red" if state in ("open", "rejected") else "yellow"
        line.append(f"{REPLICA_WORDS.get(state, state)}   ", style=style)
    if view.parked_since is not None:
        line.append(f"away for {view.now - view.parked_since:.0f} s", style="bold yellow")
    return [line]


def _answer(view: RunView) -> list[Text]:
    if not view.answers:
        return []
    shown = list(view.answers.values())[-1]
    question = _label("last answer")
    question.append(f"{printable(shown.prompt)}", style="italic")
    question.append(f"   version {shown.version}, KL {number(shown.kl)}", style=STYLE_QUIET)
    answer = Text(" " * LABEL_WIDTH)
    answer.append(printable(shown.answer))
    return [question, answer]


def _notices(view: RunView) -> list[Text]:
    """The last five, oldest first; of a row of the same kind only the newest."""
    chosen: list[Notice] = []
    for notice in reversed(view.notices):
        if not chosen or notice.event != chosen[-1].event or notice.level != "info":
            chosen.append(notice)
        if len(chosen) == 5:
            break
    out = []
    for notice in reversed(chosen):
        line = Text().append(notice.at.astimezone().strftime("%H:%M:%S").ljust(LABEL_WIDTH), style=STYLE_QUIET)
        line.append(notice.text, style=_LEVEL_STYLES.get(notice.level, ""))
        out.append(line)
    return out


def bar(shares: Shares, width: int, glyphs: Glyphs = UNICODE) -> Text:
    """The three shares side by side, exactly ``width`` cells."""
    worked = round(shares.worked * width)
    room = min(width - worked, round(shares.waited_room * width))
    text = Text(glyphs.worked * worked, style=STYLE_WORKED)
    text.append(glyphs.waited_room * room, style=STYLE_ROOM)
    text.append(glyphs.waited_input * (width - worked - room), style=STYLE_INPUT)
    return text


def sparkline(values: Iterable[float | None], width: int, glyphs: Glyphs = UNICODE) -> str:
    """At most ``width`` columns, oldest left; with more values than columns each column is a mean of neighbours.

    Lowest value at the bottom, highest at the top; a value that is None is a gap.
    """
    points = list(values)
    if width < 1 or not points:
        return ""
    if len(points) > width:
        edges = [round(i * len(points) / width) for i in range(width + 1)]
        points = [_mean(points[a:b]) for a, b in itertools.pairwise(edges)]
    finite = [point for point in points if point is not None]
    if not finite:
        return " " * len(points)
    low, high = min(finite), max(finite)
    top = len(glyphs.steps) - 1
    scale: Callable[[float], int] = lambda v: round((v - low) / (high - low) * top) if high > low else top // 2  # noqa: E731
    return "".join(" " if point is None else glyphs.steps[scale(point)] for point in points)


def clock(seconds: float) -> str:
    """``1:42`` or ``2:01:42``."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _mean(points: Sequence[float | None]) -> float | None:
    finite = [point for point in points if point is not None]
    return sum(finite) / len(finite) if finite else None


def _from_to(first: float, last: float, glyphs: Glyphs) -> str:
    return number(last) if first == last else f"{number(first)} {glyphs.arrow} {number(last)}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _label(text: str) -> Text:
    return Text().append(text.ljust(LABEL_WIDTH), style=STYLE_LABEL)
