"""From a graph to living objects: channels between actors, whoever wrote those. Nothing here runs; ``engine.node``
starts what is made."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from engine.actor import Actor, RestartPolicy
from engine.errors import ClosedChannel, EndOfChannel, RecipeError, UserError, WouldBlock
from engine.graph import ActorSpec, Graph, Ports
from engine.parts import Parts
from engine.transport.channel import Receiver, Sender, open_channel


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """A graph come to life, not started."""

    actors: tuple[Actor, ...]
    """In the order in which they start."""
    restarts: dict[str, RestartPolicy | None]
    wiring: tuple[dict[str, str | None], ...]
    """Name of each actor and of the channels that it consumes and produces, in the order of the flow."""
    senders: dict[str, Sender[Any]]
    """One end of every channel, for its statistics."""
    at_end: dict[str, Callable[[], None]]
    """By actor: what must be so when it has come to its end."""


def build(graph: Graph, parts: Parts) -> Built:
    """Make the channels and the actors of ``graph``.

    Raises:
        RecipeError: a maker of the user's own raised, or made something else than an actor.
    """
    graph.check()
    ends: dict[str | None, tuple[Sender[Any], Receiver[Any]]] = {
        channel.name: open_channel(
            channel.name,
            max_items=channel.max_items,
            max_weight=channel.max_weight,
            weigh=channel.weigh,
            clock=parts.clock,
        )
        for channel in graph.channels
    }
    nothing: tuple[Sender[Any], Receiver[Any]] = open_channel("nothing", max_items=1)
    actors = tuple(
        _make_actor(
            spec,
            Ports(
                name=spec.name,
                input=ends.get(spec.consumes, nothing)[1],
                output=ends.get(spec.produces, nothing)[0],
                parts=parts,
            ),
        )
        for spec in graph.start_order()
    )
    return Built(
        actors=actors,
        restarts={spec.name: spec.restart for spec in graph.actors},
        wiring=tuple(
            {"name": spec.name, "consumes": spec.consumes, "produces": spec.produces} for spec in graph.actors
        ),
        senders={name: sender for name, (sender, _) in ends.items() if name is not None},
        at_end={
            spec.name: partial(_end, ends[spec.consumes][1], ends[spec.produces][0])
            for spec in graph.actors
            if spec.consumes is not None and spec.produces is not None
        },
    )


def _end(received: Receiver[Any], handed_on: Sender[Any]) -> None:
    """What an actor between two channels leaves behind: an output that is closed, as nothing comes from it any more.

    Raises:
        RecipeError: its input goes on, so who fills it would wait for ever.
    """
    handed_on.close()
    try:
        received.try_receive()
    except EndOfChannel:
        return
    except (WouldBlock, ClosedChannel):
        pass
    raise RecipeError(f"its run() returned before {received.name!r} ended; an actor reads its input until that ends")


def _make_actor(spec: ActorSpec, ports: Ports) -> Actor:
    try:
        actor = spec.make(ports)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        # What fails in our own makers is our mistake and keeps its traceback.
        if getattr(spec.make, "__module__", "").partition(".")[0] == "engine":
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise RecipeError(
            f"actor {spec.name!r}: its make(ports) raised {type(error).__name__}: {error} "
            f"({last.filename}:{last.lineno})"
        ) from error
    if not isinstance(actor, Actor):
        raise RecipeError(f"actor {spec.name!r}: its make(ports) returned {type(actor).__name__}, expected an Actor")
    return actor
