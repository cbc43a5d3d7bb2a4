"""The faults that mutants.py plants: each is a line of the hot path that is missing, or one of another kind.

A mutant names the text that it replaces, which stands in its file once (tests/tools/test_mutants.py holds it to that).
Who changes such a line changes the mutant with it. Not here are mutants that make no difference, as a wait that another
one implies; a comment says which.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        file: below the pack's root.
        name: what is wrong, in words.
        old, new: the text, and what stands there instead.
        tests: which ought to notice; the quickest first.
    """

    file: str
    name: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied_to(self, text: str) -> str:
        """The file's ``text`` with the fault in it.

        Raises:
            ValueError: what it replaces is not there, or not once.
        """
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: {self.name}: {self.old!r} is there {found} times, not once")
        return text.replace(self.old, self.new)


def _in(file: str, tests: str, *faults: tuple[str, str, str]) -> Iterator[Mutant]:
    """Mutants of one file: of each the name, the text, and what stands there instead."""
    for name, old, new in faults:
        yield Mutant(file, name, old, new, tuple(f"tests/streaming/{test}.py" for test in tests.split()))


MUTANTS: tuple[Mutant, ...] = (
    *_in(
        "streaming/ring.py",
        "test_baking test_cuda_races test_streamer_races test_streamer_failures",
        ("a slot is taken without a mark", "free=backend.mark()", "free=None"),
        ("a copy does not wait until its slot is free", "pairs, slot.free, fine", "pairs, None, fine"),
        ("what made no slot keeps the others", "            self.release()\n            raise", "            raise"),
        ("slots are not given back", "self._backend.free(slot.buffer)", "pass"),
    ),
    *_in(
        "streaming/lane.py",
        "test_cuda_races test_streamer_races test_streamer_failures test_streamer_steps",
        (
            "pinned copies go while the reader has others",
            "pairs is not None and self._reader.idle",
            "pairs is not None",
        ),
        (
            "a slot is free before its kernels are done",
            "self._ring.slots[run.slot].free = self._backend.mark()",
            "pass",
        ),
        (
            "kernels do not wait for a page-locked copy",
            "            self._stalls.add(self._backend.wait(slot.ready))\n",
            "",
        ),
        ("kernels do not wait for a staged copy", "        backend.wait(slot.ready)\n", ""),
        ("a staged copy does not wait until its slot is free", "parts, target.free, opening", "parts, None, opening"),
        (
            "modules still point at the slot",
            "            for binding in self._home[number]:\n                binding.apply()\n",
            "",
        ),
        ("a segment with a unit that runs is released", "run.left == 0 and run.active == 0", "run.left == 0"),
        ("a segment that somebody uses makes way", "if run.active == 0 and (", "if ("),
        ("a segment that its block holds makes way", "segment.runs > 0 or segment.block not in self._running", "True"),
        ("a block that ends releases nothing", "in self._of_block.get(block, ()) if number in", "in () if number in"),
        (
            "what an interrupt left bound stays",
            "            for number in list(self._open):\n                self._release(number)\n",
            "            self._open.clear()\n",
        ),
        (
            "a copy that failed counts as made",
            "                self._schedule.drop(copy.slot)\n",
            "",
        ),
        ("a segment that failed counts as held", "            self._schedule.drop(entry.slot)\n", ""),
        (
            "a slot is released twice",
            "            self._schedule.leave(run.slot)\n",
            "            self._schedule.leave(run.slot)\n            self._schedule.leave(run.slot)\n",
        ),
    ),
    *_in(
        "streaming/lane.py",
        "test_streamer_patches test_streamer_memory test_streamer_adaptation test_builder test_verify",
        ("changed master copies are not copied anew", "        self._schedule.forget()\n", ""),
        (
            "segments go home to copies that are gone",
            "            self._home[number] = [unit.home for unit in group]\n",
            "",
        ),
        (
            "slots are not given back",
            "        self._ring.release()\n\n    # -- one segment",
            "        pass\n\n    # -- one segment",
        ),
    ),
    *_in(
        "streaming/schedule.py",
        "test_schedule test_streamer_races",
        (
            "a slot in use is given away ahead",
            "if self._users[slot] == 0 and held not in wanted",
            "if held not in wanted",
        ),
        ("a slot in use is given away for a miss", "if users == 0]", "]"),
        (
            "what is wanted soon is overwritten",
            "if self._users[slot] == 0 and held not in wanted",
            "if self._users[slot] == 0",
        ),
        ("contents that are out of date count", "self._held = [None] * len(self._held)", "pass"),
    ),
    *_in(
        "streaming/backend.py",
        "test_cuda_backend test_cuda_races test_streamer_races",
        ("copies are not in order", "in (self._last_copy, after) if", "in (after,) if"),
        ("copies wait for nobody", "in (self._last_copy, after) if", "in (self._last_copy,) if"),
        ("the first of several copies counts", "return events[-1]", "return events[0]"),
        (
            "only the first piece is behind the event",
            "            after = None\n",
            "            after = None\n            break\n",
        ),
        ("all copies are on one stream", "(self._turn + 1) %", "self._turn %"),
        ("streams that are not wanted stay", "        del self._streams[copy_streams:]\n", ""),
    ),
    *_in(
        "streaming/baking.py",
        "test_baking test_streamer_patches",
        ("a place is filled without a mark", "self._free: Event = backend.mark()", "self._free: Event = None"),
        ("the copy down does not wait for kernels", "self._pairs(), self._backend.mark())", "self._pairs(), None)"),
        ("kernels do not wait for the copy up", "        self._backend.wait(self._filled)\n", ""),
        (
            "places go while copies use them",
            "        backend.synchronize()  # Race: copies may still use the places.\n",
            "",
        ),
        ("a place is filled before it is empty", "number + min(2, count)", "number + 2"),
        ("places are kept", "            backend.free(place.buffer)\n", "            pass\n"),
        # The synchronize before the signatures: the one in "finally" implies it, where nothing goes wrong.
    ),
    *_in(
        "streaming/masters.py",
        "test_baking test_cuda_races test_arrival test_streamer_patches",
        ("kernels do not wait for a resident", "        backend.wait(event)  # Race", "        # Race"),
        ("half a patch counts as none", "            self._baked[value.name] = _UNFINISHED\n", ""),
        (
            "modules keep a resident that is gone",
            "        self.bind()  # A module that still pointed at the buffer would keep its memory.\n",
            "",
        ),
        (
            "a resident that is gone keeps its memory",
            "            backend.free(resident.buffer)\n",
            "            pass\n",
        ),
        ("what did not arrive counts as arrived", "if arriving.transfer.queued.exception() is None", "if True"),
    ),
    *_in(
        "streaming/placement.py",
        "test_baking test_cuda_races test_arrival test_streamer_patches test_streamer_failures",
        ("a resident is read without a mark", "free = self._backend.mark()", "free = None"),
        ("what is outside of blocks is not waited for", "        self.arrive(-1)\n", ""),
        (
            "patches are written while the reader copies",
            "            self.arrive_all()  # The reader queues copies too.\n",
            "            pass\n",
        ),
        (
            "a block begins without its residents",
            "            waiting[0].arrive(self._backend, self._supply.reader, self._supply.tick)\n            self._check(waiting.pop(0))\n",
            "            waiting.pop(0)\n",
        ),
        ("copies on their way are forgotten", "                copies.stop_awaiting(self._backend)\n", ""),
    ),
    *_in(
        "streaming/reader.py",
        "test_cuda_races test_reader test_streamer_races test_cancelling",
        (
            "the ring is unlocked without waiting",
            "        self._backend.synchronize()  # Race: copies out",
            "        # Race: copies out",
        ),
        (
            "a chunk is filled before its copy is over",
            "            self._backend.finish(chunk.sent)  # Race",
            "            # Race",
        ),
        ("a chunk does not know its copy", "                piece.chunk.sent = event\n", "                pass\n"),
        ("a chunk is filled before its copy is queued", "        chunk.free.clear()\n", ""),
        (
            "staged copies wait for nobody",
            "for piece in pieces], transfer.after, transfer.fine",
            "for piece in pieces], None, transfer.fine",
        ),
        ("a transfer is over with its first copy", "self._backend.all_of(transfer.events)", "transfer.events[0]"),
        ("the reader is always idle", "return not self._pending", "return True"),
        ("what was given up is copied", "if not (transfer.stopped or self._forsaken):", "if True:"),
        ("giving up waits for nothing", "        wait_for_futures([transfer.queued for transfer in pending])\n", ""),
        ("the ring is kept", "        self._arena.release(self._ring)\n", ""),
        ("the ring is not page-locked", "            self._arena.lock(ring)\n", ""),
        (
            "flush waits for nothing",
            "        wait_for_futures([transfer.queued for transfer in list(self._pending)])\n",
            "        pass\n",
        ),
    ),
    *_in(
        "streaming/in_order.py",
        "test_in_order test_reader",
        (
            "nobody looks once more",
            "        while self._first_ready() is not None:\n            if not self._handing_on",
            "        if self._first_ready() is not None:\n            if not self._handing_on",
        ),
        ("pieces of other transfers are handed on along", "and self._belongs(items[-1], item)", "and True"),
        (
            "what was finished in a pause is forgotten",
            "        finally:\n            self._hand_on_what_is_ready(hand_on)\n",
            "        finally:\n            pass\n",
        ),
    ),
    *_in(
        "streaming/site.py",
        "test_cuda_races test_baking test_arrival test_builder test_cancelling test_streamer_memory "
        "test_streamer_failures test_streamer_races",
        (
            "halt does not wait for the device",
            "        self.supply.halt()\n        self.backend.synchronize()\n",
            "        self.supply.halt()\n",
        ),
        ("halt leaves the reader and the builder at work", "        self.supply.halt()\n", ""),
        ("halt forgets what has arrived", "        self.placement.stop_awaiting()\n", ""),
        (
            "halt leaves segments bound",
            "        self.settle()\n        self.supply.halt()\n",
            "        self.supply.halt()\n",
        ),
        (
            "drain does not wait for the device",
            "        self.supply.reader.flush()\n        self.backend.synchronize()\n",
            "        self.supply.reader.flush()\n",
        ),
        (
            "drain does not wait for the reader",
            "        self.supply.reader.flush()\n        self.backend.synchronize()\n",
            "        self.backend.synchronize()\n",
        ),
        (
            "drain leaves segments bound",
            "        self.settle()\n        self.finish_copies()\n",
            "        self.finish_copies()\n",
        ),
        (
            "residents go while the device uses them",
            "        else:\n            self.drain()\n        for unit in",
            "        for unit in",
        ),
        (
            "changed copies are copied amid others",
            "            self.drain()\n            self.lane.forget()\n",
            "            self.lane.forget()\n",
        ),
        (
            "master copies go while copies read them",
            "        self.halt()\n        before = self.supply",
            "        before = self.supply",
        ),
        ("a lane that is dropped keeps its slots", "            self.lane.close()\n", "            pass\n"),
        (
            "a dropped model's backend is not closed",
            "    supply.forsake()\n    backend.close()\n",
            "    supply.forsake()\n",
        ),
        ("a dropped model's threads go on", "    supply.forsake()\n    backend.close()\n", "    backend.close()\n"),
    ),
    *_in(
        "streaming/streamer.py",
        "test_baking test_cuda_races test_streamer_memory test_streamer_failures test_builder test_page_locking",
        (
            "a plan is carried out amid copies",
            "            self.site.halt()\n            self.site.drop_lane()\n",
            "            self.site.drop_lane()\n",
        ),
        (
            "a lane outlives its plan",
            "            self.site.halt()\n            self.site.drop_lane()\n",
            "            self.site.halt()\n",
        ),
        ("master copies go while a step runs", "0 if self._depth or self._lent else", "0 if self._lent else"),
        (
            "a lane outlives its master copies",
            "            self.site.drop_lane()\n            self._steps.state = State.REDUCED\n",
            "            self._steps.state = State.REDUCED\n",
        ),
        (
            "unloading waits for nothing",
            "        self.site.halt()\n        self._runner.finish(self)\n",
            "        self._runner.finish(self)\n",
        ),
    ),
    *_in(
        "streaming/arena.py",
        "test_arena test_page_locking test_cuda_races",
        ("memory stays locked", "    backend.unregister(memory.data_ptr())\n", ""),
        ("closing does not unlock", "            self._lock()\n", ""),
        (
            "a refused claim is kept",
            "        if reason is not None:\n            self._end_claim()\n            return reason\n",
            "        if reason is not None:\n            return reason\n",
        ),
        (
            "memory goes while it is locked",
            "weakref.finalize(self, _unlock, backend, self.memory, budget)",
            "weakref.finalize(self, _unlock, backend, self.memory[:0], budget)",
        ),
    ),
    *_in(
        "streaming/cpu_backend.py",
        "test_reader test_streamer_races test_arrival test_streamer_memory",
        ("copies of a virtual device wait for nobody", "            wait_for_futures(waits)\n", ""),
        ("compute of a virtual device waits for nobody", "        event.result()\n        seconds", "        seconds"),
        ("the last of several copies counts", "return _AllOf(events)", "return events[-1]"),
        ("nobody waits on the host", "        wait_for_futures([event])\n", "        pass\n"),
        ("a virtual device is closed with its bytes", "        self.store.give(self.allocated)\n", ""),
    ),
    *_in(
        "streaming/cuda_backend.py",
        "test_cuda_backend test_cuda_races test_baking",
        (
            "the device is the first one",
            "if device.index is not None else torch.cuda.current_device()",
            "if device.index is not None else 0",
        ),
        ("the device is the one that is current", "device.index if device.index is not None else torch", "torch"),
        (
            "copy streams are the current device's",
            "return torch.cuda.Stream(self.device)",
            "return torch.cuda.Stream()",
        ),
        (
            "copies without a stream are on the current device",
            "stream = stream or torch.cuda.current_stream(self.device)",
            "stream = stream or torch.cuda.current_stream()",
        ),
        (
            "copies are on the compute stream",
            "        with torch.cuda.stream(stream):\n",
            "        with torch.cuda.stream(torch.cuda.current_stream(self.device)):\n",
        ),
        ("copies wait for nothing", "            for event in waits:\n", "            for event in waits[:0]:\n"),
        (
            "copies wait for the first event alone",
            "            for event in waits:\n",
            "            for event in waits[:1]:\n",
        ),
        (
            "copies wait for the last event alone",
            "            for event in waits:\n",
            "            for event in waits[-1:]:\n",
        ),
        (
            "a copy's time begins before it may start",
            "            for event in waits:\n                # Race: the kernels that used the target before may still be reading it, and an earlier\n                # copy into the same slot may not be done.\n                stream.wait_event(event)\n            times = self._copy_times\n            begin = self._timestamp(stream) if times is not None else None\n",
            "            times = self._copy_times\n            begin = self._timestamp(stream) if times is not None else None\n            for event in waits:\n                stream.wait_event(event)\n",
        ),
        ("copies block the host", "target.copy_(source, non_blocking=True)", "target.copy_(source)"),
        (
            "one pair is copied",
            "            for target, source in pairs:\n",
            "            for target, source in pairs[:1]:\n",
        ),
        (
            "who waits for a copy spins",
            "enable_timing=times is not None, blocking=True)",
            "enable_timing=times is not None)",
        ),
        ("every copy is timed", "enable_timing=times is not None, blocking", "enable_timing=True, blocking"),
        ("no copy is timed", "enable_timing=times is not None, blocking", "enable_timing=False, blocking"),
        (
            "a copy's end is on the compute stream",
            "            done.record(stream)\n",
            "            done.record(torch.cuda.current_stream(0))\n",
        ),
        ("a copy's end is not recorded", "            done.record(stream)\n", ""),
        (
            "a copy's end is recorded before it",
            "            for target, source in pairs:\n                target.copy_(source, non_blocking=True)\n            # Blocking: a thread that waits for it (finish) sleeps, and takes no core from the others.\n            done = torch.cuda.Event(enable_timing=times is not None, blocking=True)\n            done.record(stream)\n",
            "            done = torch.cuda.Event(enable_timing=times is not None, blocking=True)\n            done.record(stream)\n            for target, source in pairs:\n                target.copy_(source, non_blocking=True)\n",
        ),
        (
            "times are not kept",
            "                times.append(CopyTime(count_bytes(pairs), begin, done))\n",
            "                pass\n",
        ),
        (
            "times have no begin",
            "        event = torch.cuda.Event(enable_timing=True)\n        event.record(stream)\n",
            "        event = torch.cuda.Event(enable_timing=True)\n",
        ),
        ("times are on another stream", "        event.record(stream)\n", "        event.record()\n"),
        (
            "moments have no time",
            "        event = torch.cuda.Event(enable_timing=True)\n",
            "        event = torch.cuda.Event()\n",
        ),
        (
            "what torch keeps counts as used",
            '        cached = stats.get("reserved_bytes.all.current", 0) - stats',
            '        cached = 0 * stats.get("reserved_bytes.all.current", 0) - stats',
        ),
        ("less than nothing is kept", "max(0, cached) + held", "cached + held"),
        ("what a record holds is not counted", "max(0, cached) + held", "max(0, cached)"),
        ("memory is the current device's", "torch.cuda.mem_get_info(self.device)[0]", "torch.cuda.mem_get_info()[0]"),
        (
            "all memory counts as free",
            "torch.cuda.mem_get_info(self.device)[0]",
            "torch.cuda.mem_get_info(self.device)[1]",
        ),
        (
            "the allocator's figures are the current device's",
            "torch.cuda.memory_stats(self.device)",
            "torch.cuda.memory_stats()",
        ),
        (
            "another device is tidied up",
            "        with torch.cuda.device(self.device):\n            torch.cuda.empty_cache()",
            "        torch.cuda.empty_cache()",
        ),
        ("nothing is tidied up", "            torch.cuda.empty_cache()", "            pass"),
        (
            "moments are the current device's",
            "self._timestamp(torch.cuda.current_stream(self.device))",
            "self._timestamp(torch.cuda.current_stream())",
        ),
        ("times are in milliseconds", "begin.elapsed_time(end) / 1000", "begin.elapsed_time(end)"),
        ("times are asked for too early", " / 1000 if end.query() else None", " / 1000"),
        ("times are asked for when they began", "if end.query() else None", "if begin.query() else None"),
        (
            "marks are the current device's",
            "return torch.cuda.current_stream(self.device).record_event()",
            "return torch.cuda.current_stream().record_event()",
        ),
        (
            "marks are not recorded",
            "return torch.cuda.current_stream(self.device).record_event()",
            "return torch.cuda.Event()",
        ),
        (
            "waits are the current device's",
            "        stream = torch.cuda.current_stream(self.device)\n        if",
            "        stream = torch.cuda.current_stream()\n        if",
        ),
        ("compute waits for nothing", "        stream.wait_event(event)\n        after", "        after"),
        (
            "every wait is over",
            "        if event.query():\n            return _no_stall",
            "        if True:\n            return _no_stall",
        ),
        (
            "a wait that is over is timed",
            "        if event.query():\n            return _no_stall",
            "        if False:\n            return _no_stall",
        ),
        (
            "a stall ends before the wait",
            "        stream.wait_event(event)\n        after = self._timestamp(stream)\n",
            "        after = self._timestamp(stream)\n        stream.wait_event(event)\n",
        ),
        (
            "a stall begins after the wait",
            "        before = self._timestamp(stream)\n        # Race: the block's kernels must not read the slot before the copy into it is done.\n        stream.wait_event(event)\n",
            "        stream.wait_event(event)\n        before = self._timestamp(stream)\n",
        ),
        ("finish waits for nothing", "            event.synchronize()\n", "            pass\n"),
        ("finish does not ask", "        if not event.query():  # Asking", "        if True:  # Asking"),
        (
            "synchronize waits for the current device",
            "        torch.cuda.synchronize(self.device)\n\n    def register",
            "        torch.cuda.synchronize()\n\n    def register",
        ),
        (
            "synchronize waits for compute alone",
            "        torch.cuda.synchronize(self.device)\n\n    def register",
            "        torch.cuda.current_stream(self.device).synchronize()\n\n    def register",
        ),
        (
            "synchronize waits for nothing",
            "        torch.cuda.synchronize(self.device)\n\n    def register",
            "        pass\n\n    def register",
        ),
        ("memory of others is locked again", "        if buffer.is_pinned():\n", "        if False:\n"),
        (
            "a lock makes a context elsewhere",
            "        with torch.cuda.device(self.device):\n            code = int(torch.cuda.cudart().cudaHostRegister(",
            "        if True:\n            code = int(torch.cuda.cudart().cudaHostRegister(",
        ),
        ("memory is locked for one device", "HOST_REGISTER_PORTABLE = 1", "HOST_REGISTER_PORTABLE = 0"),
        (
            "a refused lock counts as made",
            "        if code == 0:\n            return None\n",
            "        if code >= 0:\n            return None\n",
        ),
        (
            "half of the memory is locked",
            "buffer.data_ptr(), buffer.nbytes, HOST",
            "buffer.data_ptr(), buffer.nbytes // 2, HOST",
        ),
        ("a refused lock leaves an error", "        self._drain_error()\n        return f", "        return f"),
        (
            "an unlock makes a context elsewhere",
            "        with torch.cuda.device(self.device):\n            code = int(torch.cuda.cudart().cudaHostUnregister(",
            "        if True:\n            code = int(torch.cuda.cudart().cudaHostUnregister(",
        ),
        ("a failed unlock leaves an error", "        if code != 0:\n            self._drain_error()\n", ""),
        (
            "every unlock makes the host wait",
            "        if code != 0:\n            self._drain_error()\n",
            "        self._drain_error()\n",
        ),
        ("closing waits for nothing", "        self.synchronize()\n        super().close()", "        super().close()"),
        (
            "closing keeps what was allocated",
            "        self.synchronize()\n        super().close()",
            "        self.synchronize()",
        ),
        ("what takes an error is recorded", "            with self.record.paused():\n", "            if True:\n"),
        (
            "an error that comes late stays",
            "            torch.cuda.synchronize(self.device)\n        except",
            "        except",
        ),
        (
            "an error is taken without a launch",
            "                torch.ones(1, device=self.device).add_(1)\n            torch",
            "                pass\n            torch",
        ),
        ("a drained error is raised", "        except RuntimeError as error:\n", "        except KeyError as error:\n"),
    ),
)
