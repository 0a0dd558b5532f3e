"""The state of a running call, by diffusers' names: a user's callback reads it and changes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from odvae.utils.errors import UserError

from ..condition import Condition
from .inputs import CALLBACK_TENSORS, SamplingInputs
from .outputs import RolloutStep, SamplingEvent


class CallStateMixin:
    """What a pipeline's `callback_on_step_end` sees of the call."""

    _callback_tensor_inputs = list(CALLBACK_TENSORS)  # noqa: RUF012  (diffusers reads this name)

    progress_bar: Any

    def _begin(self, inputs: SamplingInputs, num_timesteps: int) -> None:
        """Set what a callback may read and assign."""
        self._guidance_scale, self._attention_kwargs = inputs.guidance_scale, inputs.attention_kwargs
        self._num_timesteps, self._interrupt = num_timesteps, False
        self._current_timestep: Tensor | None = None

    def _step_done(self, inputs: SamplingInputs, step: int, timestep: Tensor, latents: Tensor, condition: Condition,
                   null: Condition) -> tuple[Tensor, Condition, Condition]:
        """Call the user's callback after a step; return the latents and the conditions to go on with: the same objects
        where it replaced nothing."""
        self._current_timestep = timestep
        if inputs.callback_on_step_end is None:
            return latents, condition, null
        tensors = dict(zip(CALLBACK_TENSORS, (latents, condition.text, condition.text_mask, null.text, null.text_mask),
                           strict=True))
        given = {name: tensors[name] for name in inputs.callback_on_step_end_tensor_inputs}
        changed = inputs.callback_on_step_end(self, step, timestep, given) or {}
        replaced = {name: changed[name] for name in CALLBACK_TENSORS
                    if name in changed and changed[name] is not tensors[name]}
        return (replaced.get("latents", latents), _with_text(condition, "prompt", replaced),
                _with_text(null, "negative_prompt", replaced))

    def _with_bar(self, events: Iterable[SamplingEvent]) -> Iterator[SamplingEvent]:
        """Show a bar of the steps, as `set_progress_bar_config` configured it."""
        with self.progress_bar(total=self._num_timesteps) as bar:
            for event in events:
                if isinstance(event, RolloutStep):
                    bar.update()
                yield event

    @property
    def guidance_scale(self) -> float:
        """That of the running call; a callback may assign `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        """How often the transformer is evaluated by the running call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The noise level of the last step, 1000 for pure noise."""
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        """A callback may assign `_interrupt`: the group at hand ends after its step, and no other is started."""
        return self._interrupt


def _with_text(condition: Condition, name: str, replaced: dict[str, Tensor]) -> Condition:
    """The condition with the text that a callback put in its place."""
    embeds, mask = f"{name}_embeds", f"{name}_embeds_mask"
    if not {embeds, mask} & replaced.keys():
        return condition
    text, text_mask = replaced.get(embeds, condition.text), replaced.get(mask, condition.text_mask)
    if text is None or text_mask is None or condition.text is None:
        raise UserError(f"callback_on_step_end: this call has no {name}_embeds to replace")
    if (len(text), text.shape[2:]) != (len(condition.text), condition.text.shape[2:]) \
            or text_mask.shape != text.shape[:2]:
        raise UserError(f"callback_on_step_end: {embeds} must be (B, M, D) = ({len(condition.text)}, M, "
                        f"{condition.text.shape[2]}) and {mask} (B, M), got {tuple(text.shape)} and "
                        f"{tuple(text_mask.shape)}")
    return replace(condition, text=text.to(condition.text), text_mask=text_mask.to(text.device).bool())
