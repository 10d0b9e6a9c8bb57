"""When the deep part of the network is computed, and when its features are used again (DeepCache, arXiv 2312.00858).

Between neighbouring evaluations of a chain, the features deep inside a UNet change much less than those near its input.
So the whole network is computed every few evaluations, and in between only its outermost layers. The schedule is fixed
before the chain starts: the whole network and its outermost layers are two compiled programs.
"""

import dataclasses
from collections.abc import Sequence

from lavie_jax.diffusion.guidance import COMPUTED


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """Settings of the feature cache.

    Attributes:
        every: of so many consecutive evaluations, the first computes the whole network; 1 turns the cache off.
        depth: number of skip connections, counted from the outermost, that every evaluation computes.
    """

    every: int = 1
    depth: int = 1

    def plan(self, guidance_modes: Sequence[str]) -> tuple[bool, ...]:
        """Returns, for each evaluation, whether it computes the whole network.

        The predictions with and without the prompt have features of their own, which are always of the same age: an
        evaluation that needs both computes the whole network if the last one that did needed only one of them.

        Args:
            guidance_modes: what each evaluation computes of guidance (`Guidance.plan`).
        """
        plan, last = [], None
        for i, mode in enumerate(guidance_modes):
            lacks_half = last is None or (mode == COMPUTED and guidance_modes[last] != COMPUTED)
            whole = lacks_half or i - last >= self.every
            plan.append(whole)
            last = i if whole else last
        return tuple(plan)
