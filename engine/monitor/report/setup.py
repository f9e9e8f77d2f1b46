"""What was run and on what, in words; and where the student is. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import PurePath

from engine.monitor.report.document import Block, Code, Column, Section, Table, Text
from engine.monitor.report.gather import Facts, Saved
from engine.monitor.report.history import History, Process
from engine.monitor.report.settings import Setting, settings
from engine.monitor.report.text import one_line
from engine.monitor.sentences import size

_KEY_VALUE = (Column(name=""), Column(name=""))
_MAX_COMMANDS = 8


def what(facts: Facts) -> Section:
    return Section(title="What was run", blocks=tuple(_what(facts)))


def _what(facts: Facts) -> Iterator[Block]:
    history, view = facts.history, facts.history.view
    rows = [
        ("recipe", one_line(str(facts.recipe.get("name") or view.run or "unknown"))),
        ("folder", one_line(str(facts.folder))),
        ("objective", one_line(view.objective)),
        ("steps", _text(view.steps)),
        ("rollouts per step", _text(view.rollouts_per_step)),
        ("bound on staleness", _versions(view.max_staleness)),
        ("began", moment(history.first.began_at)),
        ("log until", moment(max((p.view.now for p in history.processes), default=None))),
        ("called in", _joined(history, lambda p: p.described.get("folder"))),
    ]
    yield Table(columns=_KEY_VALUE, rows=tuple(row for row in rows if row[1]))
    yield from _commands(history)
    if not facts.recipe:
        yield Text(text=f"The settings are not known: {facts.recipe_problem}.", is_warning=True)
        return
    yield from _settings(settings(facts.recipe))


def _commands(history: History) -> Iterator[Block]:
    lines = [_command(p.described.get("command")) for p in history.processes]
    commands = list(dict.fromkeys(line for line in lines if line))
    if commands:
        about = "Command" if len(commands) == 1 else "Commands, in the order of the processes"
        rest = len(commands) - _MAX_COMMANDS
        more = [f"# and {rest:,} more"] if rest > 0 else []
        yield Code(about=about, code="\n".join([*commands[:_MAX_COMMANDS], *more]))


def _command(words: object) -> str:
    if not isinstance(words, list) or not words:
        return ""
    program, *rest = (str(word) for word in words)
    # Which python is told by the machine's part; a path to it is of no use elsewhere.
    name = PurePath(program).name
    return shlex.join(["python" if name.startswith("python") else program, *rest])


def _settings(found: list[Setting]) -> Iterator[Block]:
    columns = (Column(name="setting"), Column(name="value"), Column(name="default"))
    changed = tuple((s.path, s.value, s.default) for s in found if not s.is_default)
    if changed:
        yield Table(columns=columns, rows=changed, title="Settings that differ from the defaults")
    yield Table(
        columns=columns,
        rows=tuple((s.path, s.value, s.default) for s in found),
        title=f"All {len(found)} settings",
        is_folded=True,
    )


def where(facts: Facts) -> Section:
    return Section(title="On what", blocks=(Table(columns=_KEY_VALUE, rows=tuple(_machine(facts))),))


def _machine(facts: Facts) -> Iterator[tuple[str, str]]:
    history = facts.history
    described = any(process.described for process in history.processes)
    rows: list[tuple[str, Callable[[Process], object]]] = [
        ("host", lambda p: p.opened.get("host")),
        ("CPU", lambda p: p.described.get("cpu")),
        ("CPUs that it may use", lambda p: p.described.get("num_cpus")),
        ("memory", lambda p: _bytes(p.described.get("memory_bytes"))),
        ("GPUs", lambda p: _gpus(p.described.get("gpus"))),
        ("system", lambda p: p.described.get("platform")),
        ("Python", lambda p: p.opened.get("python")),
        ("commit", lambda p: _commit(p)),
    ]
    for name, get in rows:
        text = _joined(history, get)
        if text:
            yield name, text
    packages = [p.described["packages"] for p in history.processes if isinstance(p.described.get("packages"), dict)]
    if not packages and facts.saved is not None:
        packages = [dict(facts.saved.packages)]
    for name in dict.fromkeys(name for found in packages for name in found):
        yield one_line(str(name)), _distinct(str(found[name]) for found in packages if name in found)
    if not described:
        yield "the rest", "not recorded in this log"


def _joined(history: History, get: Callable[[Process], object]) -> str:
    return _distinct(str(value) for p in history.processes if (value := get(p)) not in (None, ""))


def _distinct(values: Iterable[str]) -> str:
    """A resumed run may have changed its place; each of them once, in order."""
    return ", then ".join(one_line(value) for value in dict.fromkeys(values))


def _bytes(value: object) -> str:
    return size(value) if isinstance(value, int) else ""


def _gpus(value: object) -> str:
    if not isinstance(value, list):
        return ""
    names = [str(name) for name in value]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "none used"


def _commit(process: Process) -> str:
    if not process.described:
        return ""
    commit = process.described.get("commit")
    if not commit:
        return "not a checkout"
    text = str(commit)
    return f"{text.removesuffix('-dirty')} with uncommitted changes" if text.endswith("-dirty") else text


def student(facts: Facts) -> Section:
    return Section(title="The student", blocks=tuple(_student(facts)))


def load_line(saved: Saved) -> str:
    """The line of Python that loads it."""
    return f"AutoModelForCausalLM.from_pretrained({json.dumps(str(saved.path / 'student'), ensure_ascii=False)})"


def _student(facts: Facts) -> Iterator[Block]:
    saved = facts.saved
    if saved is None:
        written = facts.history.view.checkpoint
        lost = f" The log names {one_line(written[1])}, which is not there." if written is not None else ""
        yield Text(text=f"There is no checkpoint in {one_line(str(facts.folder))}.{lost}")
        return
    yield Table(
        columns=_KEY_VALUE,
        rows=(
            ("newest checkpoint", one_line(str(saved.path))),
            ("optimizer steps done", f"{saved.step:,}"),
            ("size", size(saved.num_bytes)),
        ),
    )
    if saved.has_student:
        yield Code(about="Load the student with transformers", code=load_line(saved))
    else:
        yield Text(text="There is no student in it that transformers could load.", is_warning=True)


def moment(epoch_s: float | None) -> str:
    """To the second, UTC; empty when it is not known."""
    return "" if not epoch_s else datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _versions(count: int | None) -> str:
    return "" if count is None else "1 version" if count == 1 else f"{count:,} versions"


def _text(value: object) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
