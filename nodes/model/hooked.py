"""Hooks of the host that write into weights (a LoRA that is attached to conditioning), where weights move.

[Note: hooks and weights that move]
The host writes hooked weights to the tensors that the modules hold, keeps the values that were there, and writes these
back later. Both writes must reach the same copy, on the device or in host memory, and never the original, which is the
file. So:
 1. Code that moves weights of a MODEL, on any of its devices, takes hooks off first (``unpatch_hooks``).
 2. Hooks are written only while the MODEL is whole: loaded on all of its devices, with nothing given up. Otherwise
    they are marked as in effect for the host (``current_hooks``), and nothing is written yet.
 3. A step remembers the hooks that were in effect when it began, and puts them into the weights whenever its forward
    begins (steps.py): everything that it needs is loaded then.
 4. While hooks are in the weights no master copy is taken away.
 5. Nothing is written while a copy may be under way. The host is ahead of its GPU, so the copies of a step that it has
    left behind are still to come, and those of its last blocks would have what belongs to the next step.
If a copy is freed with hooks in it all the same, the values that were kept for it are dropped and not written back.
"""

from __future__ import annotations

from typing import Any

from .streamed_patcher import StreamedPatcher


class HookedPatcher(StreamedPatcher):
    """A :class:`ModelPatcher` whose hooks write into weights that streamers place.

    Attributes:
        prompt_has_hooks: whether hooks are attached to the conditioning of the prompt that the host has last prepared.
    """

    prompt_has_hooks = False

    @property
    def hooked(self) -> HookedPatcher:
        """The patcher whose hooks and patches are in the weights here."""
        return self

    def holds_hooks(self, hooks: Any) -> bool:
        """Whether ``hooks``, and no others, are in the weights."""
        return self.streamed.hooks is hooks

    def put_hooks_on(self, hooks: Any) -> None:
        """Write ``hooks`` into the weights, unless they are there already."""
        if not self.holds_hooks(hooks):
            self.apply_hooks(hooks, force_apply=True)

    def register_all_hook_patches(self, hooks: Any, *args: Any, **options: Any) -> Any:
        """The host calls this before it loads a MODEL, with all hooks of the prompt, of any kind, or with none."""
        self.prompt_has_hooks = len(hooks) > 0
        return super().register_all_hook_patches(hooks, *args, **options)

    def patch_hooks(self, hooks: Any, *args: Any, **options: Any) -> None:
        names = self._names_patched_by(hooks) if hooks is not None else set()
        if names and not self.is_whole:
            self.unpatch_hooks()
            self.current_hooks = hooks
            return
        self._forget_what_is_gone()
        try:
            if names:
                for streamer in self.streamers:
                    streamer.make_masters(names)
            super().patch_hooks(hooks, *args, **options)
            self.streamed.hooks = hooks
        finally:
            self._weights_were_written()
        if self.hook_backup:
            self.streamed.tell_of_hooks()

    def unpatch_hooks(self, *args: Any, **options: Any) -> None:
        self._forget_what_is_gone()
        written = bool(self.hook_backup)
        for streamer in self.streamers if written else ():
            streamer.invalidate()  # It waits for copies; make_masters does so where hooks come.
        self.streamed.hooks = None
        try:
            super().unpatch_hooks(*args, **options)
        finally:
            self._weights_were_written(written)

    def _names_patched_by(self, hooks: Any) -> set[str]:
        return {*self.get_combined_hook_patches(hooks), *self.cached_hook_patches.get(hooks, ())}

    def _forget_what_is_gone(self) -> None:
        """Drop the kept values of weights of which only the original is left: nothing may be written to that."""
        for streamer in self.streamers if self.hook_backup else ():
            for name in streamer.bare(self.hook_backup):
                del self.hook_backup[name]

    def _weights_were_written(self, written: bool = False) -> None:
        """Have written weights copied anew, and keep master copies as long as the host has values to write back."""
        for streamer in self.streamers:
            if written or self.hook_backup:
                streamer.invalidate()
            if self.hook_backup:
                streamer.lend_masters()
            else:
                streamer.take_masters_back()
