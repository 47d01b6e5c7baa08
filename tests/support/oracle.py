"""The hand reference: the unmodified language model, fed one sample at a time with embeddings put together here.

Nothing of the engine is used: no cache, no padding. Text and images are merged, positions counted, masks written out
and deepstack planes aligned by the code of this file. For methods inside the LLM its layers are called one by one, and
their attention is written out. Vision encoder and projector are the model's own.

Prompt and answer are one sequence, and one pass gives the logits of every greedy step, because no column of the prompt
attends to a later one. That includes the second turn of a conversation, which is more answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from tests.support.families import CORE_LLAVA, IMAGE, QWEN_VIDEO, TIMED, VIDEO, VIDEO_SIDE, WORDS, Image, Sample, family
from tests.support.models import unhooked
from tests.support.prompts import pixels

NOISE = 1e-4  # float32, on logits with a standard deviation of about 2
Decision = tuple[Tensor, list[int]]  # W `[K, N]` of one image, and the tokens at which its rows stand


def noise(name: str) -> float:
    """Return what float32 may differ by."""
    return 1e-3 if name == "qwen3.5" else NOISE  # linear layers prefill in chunks and decode in steps


# -- features -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoded:
    """Features of one image as they enter the language model, and its deepstack planes."""

    rows: Tensor
    planes: list[Tensor]

    def mixed(self, matrix: Tensor) -> Encoded:
        return Encoded(matrix @ self.rows, [matrix @ plane for plane in self.planes])


@torch.no_grad()
def encode(model: Any, name: str, sample: Sample) -> list[Encoded]:
    """Run the images of one sample through vision encoder and projector; videos one at a time, by hand."""
    stills = [image for image in sample.images if image.frames is None]
    if not stills:
        return [encode_video(model, name, image) for image in sample.images]
    accepted, inputs = inspect.signature(model.model.get_image_features).parameters, pixels(name, [Sample([], stills)])
    out = model.model.get_image_features(**{key: value for key, value in inputs.items() if key in accepted})
    sizes, pooled = [image.tokens for image in stills], out.pooler_output
    rows = torch.cat([entry.flatten(0, -2) for entry in ([pooled] if isinstance(pooled, Tensor) else pooled)])
    levels = getattr(out, "deepstack_features", None) or []  # per level, one plane per image
    planes = [list(image) for image in zip(*levels, strict=True)] or [[] for _ in sizes]
    encoded = iter([Encoded(*both) for both in zip(torch.split(rows, sizes), planes, strict=True)])
    return [next(encoded) if i.frames is None else encode_video(model, name, i) for i in sample.images]


def encode_image(model: Any, name: str, image: Image) -> Encoded:
    """Run one image alone through vision encoder and projector."""
    return encode(model, name, Sample([], [image]))[0]


@torch.no_grad()
def encode_video(model: Any, name: str, video: Image) -> Encoded:
    """Run one video alone through vision encoder and projector: one row for each of its placeholders."""
    base = model.model
    if name in QWEN_VIDEO:
        out = base.visual(video.pixels, grid_thw=video.inputs["video_grid_thw"])
        return Encoded(out.pooler_output, list(getattr(out, "deepstack_features", None) or []))
    tower = base.video_tower if name.startswith("video-llava") else base.vision_tower
    layer = -1 if name.startswith("llava-onevision") else -2
    states = tower(video.pixels[0], output_hidden_states=True).hidden_states[layer]
    project, side = base.multi_modal_projector, VIDEO_SIDE[name]
    if name.startswith("video-llava"):
        return Encoded(project(states).flatten(0, 1), [])
    if name.startswith("llava-next-video"):  # average pooling, then the projector
        cells = states[:, 1:].view(video.frames, side // 2, 2, side // 2, 2, -1).mean((2, 4))
        return Encoded(project(cells).flatten(0, 2), [])
    planes = project(states).view(video.frames, side, side, -1).permute(0, 3, 1, 2)
    smaller = interpolate(planes, size=video.grid, mode="bilinear").permute(0, 2, 3, 1).flatten(0, 2)
    return Encoded(torch.cat([smaller, base.image_newline[None]]), [])


@torch.no_grad()
def encode_resized(model: Any, name: str, image: Image, cells: tuple[int, int] | None) -> Encoded:
    """Run one image through vision encoder and projector, resized to ``cells`` visual tokens; ``None``: as it is."""
    if cells is None:
        return encode_image(model, name, image)
    if name in CORE_LLAVA:
        tower = model.model.vision_tower
        size = [n * tower.config.patch_size for n in cells]
        smaller = interpolate(image.pixels, size, mode="bicubic", antialias=True)
        states = tower(smaller, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-2]
        return Encoded(model.model.multi_modal_projector(states[:, name == "llava-clip" :])[0], [])
    patch, (h, w) = model.config.vision_config.patch_size, cells
    patches = image.pixels
    if cells != image.grid:
        picture, size = unpack(patches, (2 * image.grid[0], 2 * image.grid[1]), patch), (2 * h * patch, 2 * w * patch)
        patches = pack(interpolate(picture[None], size, mode="bicubic", antialias=True)[0], patch)
    out = model.model.visual(patches, grid_thw=torch.tensor([[1, 2 * h, 2 * w]]))
    return Encoded(out.pooler_output, list(getattr(out, "deepstack_features", None) or []))


def patch_order(rows: int, columns: int):
    """Top-left corners (in patches) in the order Qwen packs them: 2x2 groups in raster order, raster inside."""
    for top in range(0, rows, 2):
        for left in range(0, columns, 2):
            for down in range(2):
                for right in range(2):
                    yield top + down, left + right


def unpack(patches: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """Unpack the patches of a still image to `[3, H, W]`, one patch at a time."""
    picture = torch.empty(3, grid[0] * size, grid[1] * size)
    for row, (y, x) in zip(patches, patch_order(*grid), strict=True):
        frames = row.view(3, 2, size, size)
        assert torch.equal(frames[:, 0], frames[:, 1])
        picture[:, y * size : (y + 1) * size, x * size : (x + 1) * size] = frames[:, 0]
    return picture


def pack(picture: Tensor, size: int) -> Tensor:
    """Inverse of :func:`unpack`."""
    corners = patch_order(picture.shape[1] // size, picture.shape[2] // size)
    patches = [picture[:, y * size : (y + 1) * size, x * size : (x + 1) * size] for y, x in corners]
    return torch.stack([patch[:, None].repeat(1, 2, 1, 1).flatten() for patch in patches])


def largest_grid(grid: tuple[int, int], budget: int) -> tuple[int, int]:
    """Find, by trying all, the grid of at most ``budget`` cells that holds most tokens at the shape of ``grid``.

    A grid twice as stretched counts half its cells; of equals the one with more cells, then with fewer rows.
    """
    grids = [(h, w) for h in range(1, grid[0] + 1) for w in range(1, grid[1] + 1) if h * w <= budget]

    def value(cells: tuple[int, int]) -> tuple[Fraction, int, int]:
        stretch = Fraction(cells[0] * grid[1], cells[1] * grid[0])
        return cells[0] * cells[1] * min(stretch, 1 / stretch), cells[0] * cells[1], -cells[0]

    return max(grids, key=value)


def area_matrix(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Average pooling to any smaller grid, `[cells, tokens]`: repeat every token until plain pooling fits."""
    one_hot = torch.eye(grid[0] * grid[1]).view(-1, 1, *grid)
    fine = one_hot.repeat_interleave(cells[0], 2).repeat_interleave(cells[1], 3)
    return avg_pool2d(fine, grid).flatten(1).T


# -- the prompt -----------------------------------------------------------------------------------------------------


def language_model(model: Any) -> Any:
    return model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model


def positions(name: str, sample: Sample) -> tuple[Tensor, int]:
    """Return position ids `[axes, L]` of the whole prompt, and the id of the token after it."""
    declared = family(name)
    if declared.axes == 1:
        return torch.arange(len(sample.ids))[None] + declared.first_position, len(sample.ids) + declared.first_position
    images, ids, number, column, frame, image = iter(sample.images), [], 0, 0, 0, None
    while column < len(sample.ids):
        if sample.ids[column] not in (IMAGE, VIDEO):
            ids.append((number, number, number))
            number, column = number + 1, column + 1
            continue
        if image is None:
            image, frame = next(images), 0
        (h, w), frames = image.grid or (0, 0), image.frames or 1
        # with timestamps each frame is numbered by itself; else Qwen2.5-VL counts four steps a frame, Qwen2-VL one
        step = {"qwen2-vl": 1, "qwen2.5-vl": 4}.get(name, 0)
        run = 1 if name in TIMED else frames  # frames in this run of placeholders
        ids += [(number + t * step, number + y, number + x) for t in range(run) for y in range(h) for x in range(w)]
        number, column, frame = number + max(h, w), column + run * h * w, frame + run
        image = None if frame == frames else image
    return torch.tensor(ids).T, number  # generate() counts on from the last column, even if a frame's id is larger


def image_columns(sample: Sample) -> list[list[int]]:
    """Per image, the columns of the prompt in which its tokens stand; other ids may stand between them."""
    columns = iter([column for column, i in enumerate(sample.ids) if i in (IMAGE, VIDEO)])
    return [[next(columns) for _ in range(image.tokens)] for image in sample.images]


def kept_columns(sample: Sample, kept: Any) -> list[int]:
    """Columns of the prompt that stay; ``kept``: per image, original indices of the tokens that stay."""
    columns = image_columns(sample)
    stay = {of_image[int(i)] for of_image, indices in zip(columns, kept, strict=True) for i in indices}
    dropped = {column for of_image in columns for column in of_image} - stay
    return [column for column in range(len(sample.ids)) if column not in dropped]


def everything(sample: Sample) -> list[range]:
    """Per image, all of its tokens."""
    return [range(image.tokens) for image in sample.images]


@dataclass
class Sequence:
    """One prompt with its answer, `[L, …]`.

    Attributes:
        rows: embeddings, or hidden states between layers.
        planes: `[levels, L, D]`, deepstack features still to be added; zero on text.
        positions: `[axes, L]`.
        image_of: `[L]`, number of the image that a row belongs to, −1: none.
        word: `[L]` bool, the user's words: those of the prompt that follow the first image.
        prompt: rows before the answer.
        kept: per image, original indices of its tokens.
        grids: per image, (height, width) of all its tokens.
        entered_as: `[L]`, row number at the LLM's entry.
        matrices: per image, `[slots, tokens at the LLM's entry]`: the product of all decisions so far.
        layers: the layers that have run.
        entry: the sequence at the LLM's entry.
        counts: per layer, the tokens of each image.
    """

    rows: Tensor
    planes: Tensor
    positions: Tensor
    image_of: Tensor
    word: Tensor
    prompt: int
    kept: list[list[int]]
    grids: list[tuple[int, int] | None]
    entered_as: Tensor
    matrices: list[Tensor]
    layers: list[Layer] = field(default_factory=list)
    entry: Sequence | None = None
    counts: list[list[int]] = field(default_factory=list)

    @property
    def images(self) -> list[list[int]]:
        """Per image, the rows of its tokens."""
        return [(self.image_of == i).nonzero().flatten().tolist() for i in range(len(self.kept))]

    @property
    def words(self) -> list[int]:
        """Rows of the user's words."""
        return self.word.nonzero().flatten().tolist()

    def reduce(self, decisions: list[Decision], policy: str = "original") -> None:
        """Apply to each image its W: the slots stand at the anchors, and the other rows of the image leave."""
        rows, planes, images = self.rows.clone(), self.planes.clone(), self.images
        stay = self.image_of < 0
        for i, ((matrix, anchors), image) in enumerate(zip(decisions, images, strict=True)):
            slots = [image[a] for a in anchors]
            rows[slots] = matrix @ self.rows[image]
            planes[:, slots] = matrix @ self.planes[:, image]
            stay[slots] = True
            self.matrices[i] = matrix @ self.matrices[i]
            self.kept[i] = [self.kept[i][a] for a in anchors]
        self.prompt = int(stay[: self.prompt].sum())
        self.rows, self.planes, self.positions = rows[stay], planes[:, stay], self.positions[:, stay]
        self.image_of, self.word, self.entered_as = self.image_of[stay], self.word[stay], self.entered_as[stay]
        if policy == "contiguous" and not bool(stay.all()):
            self.positions = torch.arange(len(self.rows)).expand_as(self.positions)


def enter(
    model: Any, name: str, sample: Sample, kept: Any, encoded: list[Encoded], answer: list[int], policy="original"
) -> Sequence:
    """Build the sequence at the LLM's entry, with the ``encoded`` rows of the tokens ``kept`` of each image."""
    stay, columns = kept_columns(sample, kept), image_columns(sample)
    ids = torch.tensor([*(sample.ids[column] for column in stay), *answer])
    embeds = model.get_input_embeddings()(ids)
    if name == "ovis2":  # the marks around an image have embeddings of the visual table
        table, marks = model.model.visual_embeddings_table.weight, model.config.visual_indicator_token_ids
        for number, mark in enumerate(marks):
            embeds[ids == mark] = table[len(table) - len(marks) + number]
    row_of = {column: row for row, column in enumerate(stay)}
    image_of = torch.full((len(ids),), -1)
    planes = torch.zeros(len(encoded[0].planes) if encoded else 0, *embeds.shape)
    for number, (of_image, indices) in enumerate(zip(columns, kept, strict=True)):
        rows = [row_of[of_image[int(i)]] for i in indices]
        image_of[rows], embeds[rows] = number, encoded[number].rows
        for level, plane in enumerate(encoded[number].planes):
            planes[level, rows] = plane
    numbered, following = positions(name, sample)
    numbered = numbered[:, stay]
    if policy == "contiguous" and len(stay) < len(sample.ids):
        first = family(name).first_position
        numbered, following = torch.arange(first, first + len(stay)).expand_as(numbered), first + len(stay)
    tail = torch.arange(following, following + len(answer)).expand(len(numbered), -1)
    row = torch.arange(len(ids))
    first_image = int((image_of >= 0).int().argmax()) if bool((image_of >= 0).any()) else 0
    word = (ids >= WORDS.start) & (ids < WORDS.stop) & (row >= first_image) & (row < len(stay))
    tokens, grids = [[int(i) for i in indices] for indices in kept], [image.grid for image in sample.images]
    matrices, numbered = [torch.eye(len(indices)) for indices in kept], torch.cat([numbered, tail], 1)
    return Sequence(embeds, planes, numbered, image_of, word, len(stay), tokens, grids, row, matrices)


# -- the language model ---------------------------------------------------------------------------------------------


def masks(name: str, config: Any, sequence: Sequence) -> dict[str, Tensor]:
    """Return what may be attended to, `[1, 1, L, L]` additive, by kind of layer."""
    length, both_ways = len(sequence.rows), family(name).bidirectional
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    together = torch.zeros(length, length, dtype=torch.bool)
    if both_ways == "image":
        together = (sequence.image_of[:, None] == sequence.image_of) & (sequence.image_of >= 0)
    if both_ways == "prompt":
        together = (query < sequence.prompt) & (key < sequence.prompt)
    near = query - key < (getattr(config, "sliding_window", None) or length)
    sliding = ((key <= query) | together) & near
    if both_ways == "prompt":  # PaliGemma 2: at any distance
        sliding = ((key <= query) & near) | together
    allowed = {"full_attention": (key <= query) | together, "sliding_attention": sliding}
    return {kind: torch.zeros(1, 1, length, length).masked_fill(~pairs, -1e30) for kind, pairs in allowed.items()}


def layer_kinds(config: Any) -> list[str]:
    kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return getattr(config, "layer_types", None) or [kind] * config.num_hidden_layers


def axes(name: str, sequence: Sequence) -> Tensor:
    return sequence.positions[:, None] if family(name).axes == 3 else sequence.positions


def forward(model: Any, name: str, sequence: Sequence) -> Tensor:
    """Return logits `[L, vocabulary]` by one call of the language model; differentiable."""
    decoder = language_model(model)
    mask, kinds = masks(name, decoder.config, sequence), set(layer_kinds(decoder.config))
    deepstack = {}
    if len(sequence.planes):
        visual = sequence.image_of >= 0
        deepstack = {"visual_pos_masks": visual[None], "deepstack_visual_embeds": list(sequence.planes[:, visual])}
    out = decoder(
        inputs_embeds=sequence.rows[None],
        position_ids=axes(name, sequence),
        attention_mask=mask[kinds.pop()] if len(kinds) == 1 else {**mask, "linear_attention": None},
        use_cache=False,
        **deepstack,
    )
    return model.lm_head(out.last_hidden_state[0])


def logits(
    model: Any, name: str, sample: Sample, kept: Any, encoded: list[Encoded], answer: list[int], policy="original"
) -> Tensor:
    """Return logits after the prompt and after each token of ``answer``, `[1 + len(answer), vocabulary]`.

    Args:
        kept: per image, original indices of the tokens that stand in the sequence.
        encoded: per image, the rows to put there.
        policy: "original" or "contiguous" positions.
    """
    with torch.no_grad():
        return forward(model, name, enter(model, name, sample, kept, encoded, answer, policy))[-1 - len(answer) :]


# -- inside the language model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer on one sequence, with what decisions may look at, written out for Llama and Qwen."""

    decoder: Any
    number: int
    rows: Tensor  # `[L, D]`, that enter it
    position_ids: Tensor
    head: Any = None

    @cached_property
    def rotary(self) -> tuple[Tensor, Tensor]:
        cos, sin = self.decoder.rotary_emb(self.rows, self.position_ids)
        return cos[0], sin[0]

    @cached_property
    def attended(self) -> tuple[Tensor, Tensor, Tensor]:
        """Attention's output, its probabilities `[H, L, L]` and its keys `[L, heads · d]`, after rotary."""
        layer = self.decoder.layers[self.number]
        module, rows, (cos, sin) = layer.self_attn, layer.input_layernorm(self.rows), self.rotary

        def heads(projection: Any, norm: Any) -> Tensor:
            x = projection(rows).view(len(rows), -1, module.head_dim)
            return (norm(x) if norm is not None else x).transpose(0, 1)

        def rotated(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat([-b, a], -1) * sin

        query = rotated(heads(module.q_proj, getattr(module, "q_norm", None)))
        key = rotated(heads(module.k_proj, getattr(module, "k_norm", None)))
        groups = len(query) // len(key)
        scores = query @ key.repeat_interleave(groups, 0).transpose(-1, -2) / module.head_dim**0.5
        future = torch.ones(len(rows), len(rows)).triu(1).bool()
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        out = weights @ heads(module.v_proj, None).repeat_interleave(groups, 0)
        return module.o_proj(out.transpose(0, 1).flatten(1)), weights, key.transpose(0, 1).flatten(1)

    @property
    def attention(self) -> Tensor:
        return self.attended[1]

    @property
    def keys(self) -> Tensor:
        return self.attended[2]

    @property
    def mlp_input(self) -> Tensor:
        return self.decoder.layers[self.number].post_attention_layernorm(self.rows + self.attended[0])


def layer_by_layer(
    model: Any,
    name: str,
    sequence: Sequence,
    decide: Callable[[Layer, Sequence], list[Decision] | None],
    policy: str = "original",
    unseen: Tensor | None = None,
) -> Tensor:
    """Return logits `[L', vocabulary]`, the layers called one by one; before each of them ``decide`` may reduce images.

    The masks are those of the whole sequence: a window counts tokens that left, too. ``unseen``: `[L]` bool, rows that
    the answer does not attend to in any layer.
    """
    decoder = language_model(model)
    whole, sequence.entry = masks(name, decoder.config, sequence), replace(sequence)
    if unseen is not None:
        for mask in whole.values():
            mask[..., sequence.prompt :, unseen] = -1e30
    for number, (layer, kind) in enumerate(zip(decoder.layers, layer_kinds(decoder.config), strict=True)):
        decisions = decide(Layer(decoder, number, sequence.rows, axes(name, sequence), model.lm_head), sequence)
        if decisions is not None:
            sequence.reduce(decisions, policy)
        sequence.counts.append([len(image) for image in sequence.images])
        sequence.layers.append(Layer(decoder, number, sequence.rows, axes(name, sequence)))
        by_kind = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
        sequence.rows = layer(
            sequence.rows[None],
            attention_mask=whole[kind][:, :, sequence.entered_as][..., sequence.entered_as],
            position_ids=sequence.positions[:1],
            position_embeddings=decoder.rotary_emb(sequence.rows[None], axes(name, sequence), *[kind] * by_kind),
        )[0]
        if number < len(sequence.planes):
            sequence.rows = sequence.rows + sequence.planes[number]
    return model.lm_head(decoder.norm(sequence.rows[None])[0])


def run_inside(
    model: Any,
    name: str,
    sample: Sample,
    decide: Any,
    kept: Any,
    encoded: list[Encoded],
    answer: list[int],
    policy,
    leaves_caches: bool = False,
) -> tuple[Tensor, Sequence]:
    """Return logits after the prompt and each token of ``answer``, and the sequence at the end; differentiable.

    ``leaves_caches``: the answer attends in no layer to tokens that have left.
    """
    sequence = enter(model, name, sample, kept, encoded, answer, policy)
    logits = layer_by_layer(model, name, sequence, decide, policy)
    if leaves_caches:  # which ones have left is known from the first run, whose prompt is the same
        assert sequence.entry is not None
        unseen = torch.ones(len(sequence.entry.rows), dtype=torch.bool)
        unseen[sequence.entered_as] = False
        sequence = enter(model, name, sample, kept, encoded, answer, policy)
        logits = layer_by_layer(model, name, sequence, decide, policy, unseen)
    return logits[sequence.prompt - 1 :], sequence


@torch.no_grad()
def logits_inside(
    model: Any,
    name: str,
    sample: Sample,
    stages: dict[int, Any],
    answer: list[int],
    entered: Any = None,
    policy: str = "original",
    encoded: list[Encoded] | None = None,
) -> Tensor:
    """Return the same where tokens leave inside the LLM.

    Args:
        stages: before which layers; per image, original indices of the tokens that are left then.
        entered: per image, original indices of the tokens that entered it; ``None``: all.
        policy: of positions.
        encoded: per image, the rows that entered it; ``None``: those of the unmodified encoder.
    """
    entered = entered or everything(sample)
    features = encoded or [
        Encoded(e.rows[i], [p[i] for p in e.planes]) for e, i in zip(encode(model, name, sample), entered, strict=True)
    ]

    def decide(layer: Layer, sequence: Sequence) -> list[Decision] | None:
        if layer.number not in stages:
            return None
        kept = zip(sequence.kept, stages[layer.number], strict=True)
        anchors = [[slot for slot, i in enumerate(before) if i in after] for before, after in kept]
        return [(torch.eye(len(before))[a], a) for before, a in zip(sequence.kept, anchors, strict=True)]

    return run_inside(model, name, sample, decide, entered, features, answer, policy)[0]


def attended(model: Any, name: str, sample: Sample, layer: int) -> list[Tensor]:
    """Attention of the last prompt token to each image's tokens in one layer of the LLM, mean over heads."""
    weights = attention(model, name, sample, layer)
    return [weights[:, -1, columns].mean(0) for columns in image_columns(sample)]


@torch.no_grad()
def attention(model: Any, name: str, sample: Sample, layer: int) -> Tensor:
    """Attention in one layer of the LLM, `[heads, L, L]`; ``model`` runs eager attention, and nothing was dropped."""
    sequence, outputs = enter(model, name, sample, everything(sample), encode(model, name, sample), []), []
    module = language_model(model).layers[layer].self_attn
    handle = module.register_forward_hook(lambda module, args, out: outputs.append(out[1]))
    forward(model, name, sequence)
    handle.remove()
    return outputs[0][0]


def rows_left(image: Image, kept: list[int]) -> set[int]:
    """Newline tokens whose row keeps a token."""
    left, first = set(), image.tokens if len(image.newlines) > 1 else 0
    if len(image.newlines) > 1:
        first = image.newlines[0] - (image.newlines[1] - image.newlines[0] - 1)
    for newline in image.newlines:
        if any(first <= i < newline for i in kept):
            left.add(newline)
        first = newline + 1
    return left


# -- what a decision makes of an image ------------------------------------------------------------------------------


@cache
@torch.no_grad()
def unprojected(model: Any, name: str, image: Image) -> Tensor:
    """Return what enters the projector, one row per visual token, `[N, C]`."""
    if name in CORE_LLAVA:
        states = model.model.vision_tower(image.pixels, output_hidden_states=True).hidden_states[-2]
        return states[0, name == "llava-clip" :]
    tower, inputs = model.model.visual, []
    handle = tower.merger.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    out = tower(image.pixels, grid_thw=image.inputs["image_grid_thw"])
    handle.remove()
    # Qwen2.5-VL runs windows: the row of each token is found by the output that the projector makes of it
    order = torch.cdist(out.pooler_output, tower.merger(inputs[0])).argmin(-1)
    assert order.unique().shape == order.shape
    return inputs[0].view(image.tokens, -1)[order]


@torch.no_grad()
def project(model: Any, name: str, rows: Tensor) -> Tensor:
    if name in CORE_LLAVA:
        return model.model.multi_modal_projector(rows)
    return model.model.visual.merger(rows.view(-1, model.config.vision_config.hidden_size))


@cache
def features(name: str, attention: str, image: Image, cells: tuple[int, int] | None = None) -> Encoded:
    """Return :func:`encode_resized` of the unhooked model."""
    return encode_resized(unhooked(name, attention), name, image, cells)


def reduced(name: str, attention: str, image: Image, decision: Any, cells: tuple[int, int] | None = None) -> Encoded:
    """Return the rows that a decision makes of an image: W, dense, times its features; or those that a net made.

    Args:
        cells: (height, width) in tokens to which the image was resized before the vision encoder; ``None``: it was not.
    """
    if decision.rows is not None:
        return Encoded(decision.rows, [])
    matrix, model = decision.matrix(), unhooked(name, attention)
    if not decision.projected:
        rows = project(model, name, matrix @ unprojected(model, name, image))
        return Encoded(rows, features(name, attention, image).mixed(matrix).planes)
    if cells is not None:
        # the features are those of the small image already: of W = W_second · W_resize only W_second acts on them
        resize = area_matrix(image.grid, cells).double()
        matrix = (matrix.double() @ torch.linalg.pinv(resize)).float()
    return features(name, attention, image, cells).mixed(matrix)
