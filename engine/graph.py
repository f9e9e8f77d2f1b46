"""Which actors a run consists of and which channels join them: a plain value that can be printed and changed before
anything starts. What the actors are made of is decided in ``engine.build``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from engine.actor import Actor, RestartPolicy
from engine.errors import RecipeError
from engine.parts import Parts
from engine.transport.channel import Receiver, Sender


class ChannelSpec(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    carries: str
    """Type of the items, for the reader."""
    max_items: int
    max_weight: float | None = None
    weigh: Callable[[Any], float] | None = None
    unit: str = "items"
    """Of the weight."""


class Ports(msgspec.Struct, frozen=True, kw_only=True):
    """What an actor's maker is given."""

    name: str
    input: Receiver[Any]
    """Its channel's receiving end (of no use to an actor that consumes nothing)."""
    output: Sender[Any]
    """Its channel's sending end (of no use to an actor that produces nothing)."""
    parts: Parts
    """Recipe, schedule and the other collaborators of the run."""


class ActorSpec(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    make: Callable[[Ports], Actor]
    consumes: str | None = None
    """Name of a channel."""
    produces: str | None = None
    restart: RestartPolicy | None = None
    """None: its failure ends the run."""
    about: str = ""


class Graph(msgspec.Struct, frozen=True, kw_only=True):
    """Actors in the order in which data flows, and their channels."""

    actors: tuple[ActorSpec, ...]
    channels: tuple[ChannelSpec, ...]

    def insert(self, name: str, *, after: str, make: Callable[[Ports], Actor], about: str = "") -> Graph:
        """Put an actor of your own behind another one.

        It receives what ``after`` sends and sends what the next actor receives, over a new channel like the one that
        was there. It must close its output when its input ends, and hand every rollout on or report it to
        ``ports.parts.schedule.failed(rollout_id, reason)``; another prompt then takes its place.

        Raises:
            RecipeError: no such actor, one that produces nothing, or a name that is taken.
        """
        names = [actor.name for actor in self.actors]
        if name in names:
            raise RecipeError(f"the graph has an actor {name!r} already; give yours another name")
        if after not in names:
            raise RecipeError(f"the graph has no actor {after!r}; its actors are {', '.join(names)}")
        position = names.index(after)
        before = self.actors[position]
        channel = next((c for c in self.channels if c.name == before.produces), None)
        if channel is None:
            raise RecipeError(f"actor {after!r} produces nothing that another actor could receive")
        new_channel = msgspec.structs.replace(channel, name=f"{channel.name}_{name}")
        new_actor = ActorSpec(name=name, make=make, consumes=channel.name, produces=new_channel.name, about=about)
        following = [
            msgspec.structs.replace(actor, consumes=new_channel.name) if actor.consumes == channel.name else actor
            for actor in self.actors[position + 1 :]
        ]
        return Graph(
            actors=(*self.actors[: position + 1], new_actor, *following), channels=(*self.channels, new_channel)
        )

    def check(self) -> None:
        """Every channel has one producer and one consumer, and every name is known.

        Raises:
            RecipeError: naming the channel.
        """
        known = {channel.name for channel in self.channels}
        for end, named in (
            ("consumes", [actor.consumes for actor in self.actors]),
            ("produces", [actor.produces for actor in self.actors]),
        ):
            for name in sorted({name for name in named if name is not None} | known):
                count = named.count(name)
                if name not in known:
                    raise RecipeError(f"an actor {end} the channel {name!r}, which the graph does not have")
                if count != 1:
                    raise RecipeError(f"{count} actors {end} from or into the channel {name!r}; it must be exactly one")

    def start_order(self) -> tuple[ActorSpec, ...]:
        """Consumers before producers, so that nobody sends to an actor that is not there yet."""
        return tuple(reversed(self.actors))

    def describe(self) -> str:
        """The picture that ``--show`` prints."""
        channels = {channel.name: channel for channel in self.channels}
        lines: list[str] = []
        for actor in self.actors:
            restart = "" if actor.restart is None else f" (restarts up to {actor.restart.max_restarts} times)"
            lines.append(f"[{actor.name}] {actor.about}{restart}".rstrip())
            if actor.produces is not None:
                channel = channels[actor.produces]
                weight = "" if channel.max_weight is None else f", {channel.max_weight:,.0f} {channel.unit}"
                consumer = next(a.name for a in self.actors if a.consumes == channel.name)
                lines.append(
                    f"   └─ {channel.name}: {channel.carries}, at most {channel.max_items} items{weight} ─▶ {consumer}"
                )
        return "\n".join(lines)
