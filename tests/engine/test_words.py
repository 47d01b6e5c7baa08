"""The columns of the user's own words, on the chat templates of LLaVA-1.5 and Qwen (ChatML)."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import tokensieve
from tests.support import families, models, prompts
from tokensieve import reference
from tokensieve.engine.prompt.user_text import UserTextFinder

LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><image><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"llava-1.5": LLAVA, "chatml": CHATML}
SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
]
CORPUS = [
    "USER: ASSISTANT: user assistant system You are a helpful assistant . \n",
    "What is in the image ? There is a red ball on the left . Is it the user 's ? one two 7 x :",
    "Describe this image . an Be brief",
]


@cache
def tokenizer(kind):
    """A small word-level or byte-level BPE tokenizer."""
    if kind == "words":
        core = Tokenizer(tokenizer_models.WordLevel(unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation()]
        )
        trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL)
    else:
        core = Tokenizer(tokenizer_models.BPE())
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    core.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=SPECIAL[4:],
    )


def processor(kind, template, bare=False):
    """A processor, or only its tokenizer."""
    core = tokenizer(kind)
    if bare:
        core.chat_template = TEMPLATES[template]
        return core
    return LlavaProcessor(CLIPImageProcessorPil(), core, patch_size=14, chat_template=TEMPLATES[template])


def model(kind):
    core = tokenizer(kind)
    return SimpleNamespace(config=SimpleNamespace(image_token_id=core.convert_tokens_to_ids("<image>")))


def turn(role, *parts):
    content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]
    return {"role": role, "content": content}


WHAT, THERE, IS_IT = "What is in the image?", "There is a red ball on the left.", "Is it the user's?"
CHATS = {
    "one turn": [turn("user", None, WHAT)],
    "a colon and the assistant's name": [turn("user", None, "Is this: an assistant?")],
    "system prompt": [turn("system", "You are a user."), turn("user", None, WHAT)],
    "two images": [turn("user", None, None, WHAT)],
    "image, text, image": [turn("user", None, WHAT, None, IS_IT)],
    "two turns": [turn("user", None, WHAT), turn("assistant", THERE), turn("user", IS_IT)],
    "an image in the second turn": [turn("user", None, WHAT), turn("assistant", THERE), turn("user", None, IS_IT)],
    "text, image": [turn("user", WHAT, None)],
    "system prompt; text, image, text": [turn("system", "You are a user."), turn("user", WHAT, None, IS_IT)],
    "an image in the second turn only": [turn("user", WHAT), turn("assistant", THERE), turn("user", IS_IT, None)],
    "three turns": [
        turn("system", "Be brief."),
        turn("user", None, WHAT),
        turn("assistant", THERE),
        turn("user", IS_IT),
        turn("assistant", "What? It is the ball."),
        turn("user", "Describe it."),
    ],
}


def prompt(kind, template, chat, placeholders=4):
    """Ids as the model gets them: every image token repeated."""
    text = processor(kind, template).apply_chat_template(chat, add_generation_prompt=True)
    image = tokenizer(kind).convert_tokens_to_ids("<image>")
    ids = tokenizer(kind)(text, add_special_tokens=False)["input_ids"]
    return [i for one in ids for i in [one] * (placeholders if one == image else 1)]


def squeezed(text):
    return "".join(text.split())


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_exactly_the_users_words(kind, template, chat, bare):
    ids = prompt(kind, template, CHATS[chat])
    words = UserTextFinder(model(kind), processor(kind, template, bare))
    found = words.columns(ids, before_image=True)
    said = [p["text"] for t in CHATS[chat] if t["role"] == "user" for p in t["content"] if p["type"] == "text"]
    core = tokenizer(kind)
    expected = "".join(core.decode(core(text, add_special_tokens=False)["input_ids"]) for text in said)
    assert squeezed(core.decode([ids[i] for i in found])) == squeezed(expected)
    assert found == sorted(set(found))
    first = ids.index(core.convert_tokens_to_ids("<image>"))
    assert words.columns(ids) == [column for column in found if column > first]  # those that have seen it


MERGED = (  # a system prompt is the start of the user's turn, as in Gemma's
    "{% set opened = namespace(text='') %}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% set opened.text = message['content'][0]['text'] + '\n' %}{% else %}<|im_start|>{{ message['role'] }}\n"
    "{{ opened.text }}{% set opened.text = '' %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REFUSAL = "{% if message['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
NO_SYSTEM = CHATML.replace("{% if loop.first", REFUSAL + "{% if loop.first")


@pytest.mark.parametrize(("template", "counted"), [(MERGED, False), (NO_SYSTEM, True)])
@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_words_before_an_image_count_only_without_a_system_prompt(kind, template, counted, monkeypatch):
    monkeypatch.setitem(TEMPLATES, "other", template)
    words, core = UserTextFinder(model(kind), processor(kind, "other")), tokenizer(kind)
    ids = prompt(kind, "other", [turn("user", WHAT, None, IS_IT)])
    found = "".join(core.decode([ids[i] for i in words.columns(ids, before_image=True)]))
    expected = (WHAT if counted else "") + IS_IT
    assert squeezed(found) == squeezed(core.decode(core(expected, add_special_tokens=False)["input_ids"]))


@pytest.mark.parametrize("template", TEMPLATES)
def test_left_padding_changes_nothing(template):
    ids, words = prompt("bpe", template, CHATS["two turns"]), UserTextFinder(model("bpe"), processor("bpe", template))
    assert words.columns([0] * 7 + ids) == [i + 7 for i in words.columns(ids)]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_without_a_processor_all_text_after_the_first_image_counts(kind, template):
    ids, core = prompt(kind, template, CHATS["two turns"]), tokenizer(kind)
    lone = model(kind)
    names = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "eos": "<|im_end|>"}
    for name, token in names.items():
        setattr(lone.config, f"{name}_token_id", core.convert_tokens_to_ids(token))
    special = {lone.config.image_token_id} | {core.convert_tokens_to_ids(t) for t in names.values()}
    first = ids.index(lone.config.image_token_id)
    assert UserTextFinder(lone).columns(ids) == [i for i in range(first, len(ids)) if ids[i] not in special]
    assert UserTextFinder(lone).columns([7, 8, 9]) == []


def test_through_attach(monkeypatch):
    """`processor=` reaches the method: template words no longer decide."""
    kind, family = "bpe", "llava-clip"
    live = models.build(family)
    live.resize_token_embeddings(len(tokenizer(kind)))
    image = live.config.image_token_id = tokenizer(kind).convert_tokens_to_ids("<image>")
    ids = torch.tensor([prompt(kind, "llava-1.5", CHATS["one turn"], families.SIDE**2)])
    pixels = prompts.batch(family, "single")[0].images[0].pixels
    seen = {}
    for name, given in (("with", processor(kind, "llava-1.5")), ("without", None)):
        with torch.no_grad(), tokensieve.attach(live, "trsm", keep=5, processor=given) as sieve:
            words = sieve._connector.text_finder.columns(ids[0].tolist())
            live(input_ids=ids, pixel_values=pixels)
            seen[name] = (words, sieve.last[0][0].scores)
            features = live.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
        text = live.get_input_embeddings()(ids[0, words])
        scores = torch.nn.functional.cosine_similarity(features[:, None], text[None], dim=-1).amax(-1)
        torch.testing.assert_close(seen[name][1], scores, atol=1e-5, rtol=1e-5)
    assert set(seen["with"][0]) < set(seen["without"][0])
    assert image not in ids[0, seen["with"][0]]


def test_a_small_vocabulary():
    """The bundled tokenizer knows neither "one" nor "two": the unknown word is no part of its template."""
    model, processor = reference.load()
    finder, tokenizer = UserTextFinder(model, processor), processor.tokenizer
    first = [{"type": "image"}, {"type": "text", "text": "what is the digit?"}]
    turns = [("user", first), ("assistant", "red"), ("user", "what colour is it?")]
    talk = [{"role": role, "content": content} for role, content in turns]
    text = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    columns, _ = finder.find(ids)
    words = ["what", "is", "the", "digit", "?", "what", "colour", "is", "it", "?"]
    assert tokenizer.convert_ids_to_tokens(ids[0, columns[0]]) == [w for w in words if w in tokenizer.get_vocab()]


def test_words_before_the_image_through_attach():
    """Before the LLM they are read; inside it they have not seen the image, and there the prompt has no words."""
    kind, family = "bpe", "llava-clip"
    live, given = models.build(family), processor(kind, "chatml")
    live.resize_token_embeddings(len(tokenizer(kind)))
    live.config.image_token_id = tokenizer(kind).convert_tokens_to_ids("<image>")
    ids = torch.tensor([prompt(kind, "chatml", CHATS["text, image"], families.SIDE**2)])
    inputs = {"input_ids": ids, "pixel_values": prompts.batch(family, "single")[0].images[0].pixels}
    with torch.no_grad(), tokensieve.attach(live, "trsm", keep=5, processor=given) as sieve:
        live(**inputs)
        features = live.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output[0]
    said = tokenizer(kind)(WHAT, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    text = live.get_input_embeddings()(said)
    scores = torch.nn.functional.cosine_similarity(features[:, None], text[None], dim=-1).amax(-1)
    torch.testing.assert_close(sieve.last[0][0].scores, scores, atol=1e-5, rtol=1e-5)
    message = r"sample 0 has no words to go by after its image \(those before it cannot attend to it\)"
    with (
        tokensieve.attach(live, "text-correlation(layer=1, keep=5)", processor=given),
        pytest.raises(ValueError, match=message),
    ):
        live(**inputs)
