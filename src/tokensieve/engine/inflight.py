"""The state of the call that is running: one object for all hooks of an attached method."""

from __future__ import annotations

import threading
from typing import Any

from tokensieve.engine.handoff import Prefill


class InFlight(threading.local):
    """The running call, separately for each thread. Every hook of one attached method reads and writes this object.

    Attributes:
        encoding: the encode call that is running (a ``RecordedCall`` of the encoder stage); ``None`` outside of one.
        prefill: the prompt as the connector stage shortened it; ``None`` outside of a prefill.
        decoding: the LLM's forward that is running (a ``PrefillState`` or a ``DecodeStep`` of the decoder stage).
        repair: the repair of attention in that forward (a ``RepairPass``); ``None``: nothing is added.
        skip: the layer that tokens skip (a ``Skip`` of the decoder stage), while it runs.
        turn: the new turn that is decided anew in that forward (a ``RunningTurn``); ``None``: none is.
        readings: {probe: what it has read}; a probe reads only while it stands here.
        stop_after_reading: the probe whose reading ends the forward.
        paused: the hooks let every call pass as if they were not there.
    """

    def __init__(self) -> None:
        self.encoding: Any = None
        self.prefill: Prefill | None = None
        self.decoding: Any = None
        self.repair: Any = None
        self.skip: Any = None
        self.turn: Any = None
        self.readings: dict[object, list[Any]] = {}
        self.stop_after_reading: object = None
        self.paused = False

    def end_encoding(self) -> None:
        """Forget the encode call, whether it returned or failed."""
        self.encoding, self.stop_after_reading = None, None
        self.readings.clear()

    def end_forward(self) -> None:
        """Forget the forward of the whole model, whether it returned or failed."""
        self.prefill, self.decoding, self.repair, self.turn, self.stop_after_reading = None, None, None, None, None
        self.skip = None
        self.readings.clear()
