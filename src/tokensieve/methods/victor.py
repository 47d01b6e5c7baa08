"""Victor: registers take over from the visual tokens after the first layers of the LLM."""

from dataclasses import dataclass

from tokensieve.budget import Budget
from tokensieve.methods import register
from tokensieve.methods.registers import RegisterMethod


@register("victor", paper="arXiv:2410.14072", stage="decoder", trained=True)
@dataclass(frozen=True)
class Victor(RegisterMethod):
    """Put R learned registers behind the N tokens of each image, and drop all N before a layer of the LLM.

    The layers before it run on N + R tokens, causally: registers see the image, and the text sees both. The layers from
    it on run on R tokens. Registers take the position ids behind the image's, the text follows them, and both keep
    theirs when the image leaves. The average over L layers is R + N · layer / L. The first rows of the registers are a
    set of their own, so that one training serves several budgets: each training step draws how many take part.

    Args:
        weights: "random", or a folder of ``tokensieve train victor``.
        layer: the layer before which the image leaves; a float is a share of the depth.
        keep: R, the registers of each image, or a share of its tokens. An image of no more tokens stays whole.

    Cost: none beside the R rows: nothing is computed or sorted.
    Paper: "Efficient Vision-Language Models by Summarizing Visual Tokens into Compact Registers", 2024.
    Official code: none. This is our reading. Positions, the nested sets and the distillation from the unreduced model
    are ours. The paper tunes projector and LLM with the registers; ``tokensieve train victor`` trains registers alone,
    which gains little. On the bundled model (layer 1, 1,300 questions), 16 registers give 52.5 % (50.6 to 54.3);
    without any, ``vtw`` gives 48.5 % (46.9 to 50.1). With an untrained set of registers and a LoRA that was tuned for
    them (600 steps of ``train adapter``), 66.0 % (64.0 to 67.9), below ``random`` at the same average; a recipe that
    trains both at once is missing. No weights are shipped.
    """

    layer: int | float = 0.1
    keep: Budget = 64
