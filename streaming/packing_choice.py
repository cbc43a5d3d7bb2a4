"""Decides whether the weights of a model stream packed on a device, once it is known what that would bring."""

from __future__ import annotations

import logging
import math

import torch

from .config import PackingMode, StreamingConfig
from .model.blocks import BlockSet
from .model.packed_units import packed_dtype
from .obstacles import Decoder, explain_unpacked, find_obstacle
from .packing.ahead import KERNELS_AHEAD
from .packing.unpackers import unpacked_bytes_per_second, unpacker_of
from .planning.packing import Packing
from .planning.plan import Plan, SecondsOf, is_bus_limited
from .planning.planner import Planner
from .run.site import Site

logger = logging.getLogger(__name__)


class PackingChoice:
    """Finds out, when it may matter, what packing would save and cost, and tells the planner. For one device.

    Args:
        blocks: the model cut into blocks, units and rest.
        site: where the weights are.
        planner: decides which units are packed.
        config: settings.
        seconds_of: returns the seconds that a step will take under a plan, by a profile.
    """

    def __init__(
        self, blocks: BlockSet, site: Site, planner: Planner, config: StreamingConfig, seconds_of: SecondsOf
    ) -> None:
        self._blocks = blocks
        self._site = site
        self._planner = planner
        self._config = config
        self._seconds_of = seconds_of
        self._decoder = Decoder()

    def configure(self, config: StreamingConfig) -> None:
        """Use other settings from now on."""
        self._config = config

    def take_up(self, blocks: BlockSet) -> None:
        """The model was laid out anew, which the planner and the site know."""
        self._blocks = blocks
        if self._decoder.bytes_per_second is not None:
            self._planner.packing = self._find_packing()

    def begin_run(self) -> None:
        """What failed is tried again: memory may have been short."""
        self._decoder = self._decoder._replace(failure="")

    def compile_ahead(self, plan: Plan) -> None:
        """The first step takes longer than to compile what may be needed behind the second."""
        may_pack = self._config.packing is not PackingMode.OFF and plan.segments and not self._obstacle
        if may_pack and not self._site.backend.is_virtual and self._dtype is not None:
            KERNELS_AHEAD.compile(self._site.backend.device)

    def learn(self, plan: Plan | None) -> bool:
        """Find out what packing would bring, if it is time for that; returns whether the planner was told.

        Args:
            plan: in effect; None while unloaded.
        """
        if self._planner.packing is not None or not self._is_wanted(plan):
            return False
        self._planner.packing = self._find_packing()
        return True

    def explain(self, plan: Plan) -> str:
        """Why weights do not stream packed with ``plan``, where that was asked for or would help."""
        return explain_unpacked(plan, self._planner, self._config.packing, self._obstacle, self._decoder.slow)

    def _is_wanted(self, plan: Plan | None) -> bool:
        """Whether to find out now what packing would bring."""
        if self._config.packing is PackingMode.OFF or self._obstacle or plan is None or self._site.lane is None:
            return False
        if not self._planner.profile.measured:
            return False
        return self._config.packing is PackingMode.ON or self._waits_for_the_bus(plan)

    def _waits_for_the_bus(self, plan: Plan) -> bool:
        """Whether a step with ``plan`` takes longer than its compute, by what is known now."""
        if plan.forecast is not None:
            return plan.forecast.limited_by == "bus"
        profile = self._planner.profile
        return is_bus_limited(self._seconds_of(plan, profile), profile.compute_seconds)

    @property
    def _obstacle(self) -> str:
        """Why no weight may be packed, with these settings on this device; empty where they may be."""
        return find_obstacle(self._config, self._decoder)

    @property
    def _dtype(self) -> torch.dtype | None:
        """Of most of what may be packed; None where nothing may be."""
        return packed_dtype(unit.layout for unit in self._blocks.units)

    def _find_packing(self) -> Packing | None:
        """What packing would save and cost; None, from then on, where it cannot be."""
        try:
            sizes = self._site.weight_copies.packed_sizes(self._site.supply.tick)
            if sizes == self._blocks.outline.unit_bytes:
                return Packing(sizes, math.inf)  # There is nothing to unpack.
            if self._decoder.bytes_per_second is None:
                self._decoder = self._time_decoder()
            return Packing(sizes, self._decoder.bytes_per_second)
        except Exception as error:  # No memory for it, or a driver that refuses: the model streams as it is.
            logger.warning("weights do not stream packed on %s: %s", self._site.backend.name, error)
            self._decoder = Decoder(failure=_first_line(str(error)) or type(error).__name__)
            return None

    def _time_decoder(self) -> Decoder:
        backend = self._site.backend
        speed = unpacked_bytes_per_second(backend, self._dtype or torch.bfloat16)
        slow = "" if backend.is_virtual else unpacker_of(backend.device).reason
        return Decoder(speed, _first_line(slow))


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
