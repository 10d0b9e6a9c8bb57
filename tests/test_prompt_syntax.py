"""Weighted prompts and prompts in chunks: what they mean, that they change nothing else, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lavie_jax
import sample
from lavie_jax.cascade import Request, check_texts
from lavie_jax.cascade.denoising import Clip, _texts
from lavie_jax.cascade.model import weigh
from lavie_jax.data import tokens
from lavie_jax.data.token_chunks import tokenize_chunks
from lavie_jax.errors import UserError
from lavie_jax.models.additions import max_over_words
from lavie_jax.models.attention import attention
from lavie_jax.samples.again import options_of
from lavie_jax.samples.outputs import make_request
from lavie_jax.samples.prompt_syntax import AS_IS, STEP, Reading, words_of
from lavie_jax.stages.conditioning import Prompts
from lavie_jax.stages.settings import BaseSettings
from lavie_jax.stages.windows import grid, whole

WEIGHTED = Reading("weighted")
BOTH = Reading("weighted", "chunk")
LONG = "a red circle moving left a blue square moving right"  # 10 words; a window has room for 6


def runs(text: str, reading: Reading = WEIGHTED) -> list[tuple[str, float]]:
    (part,) = reading.parse(text)
    return [(run.text, pytest.approx(run.weight)) for run in part]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a red circle", [("a red circle", 1)]),
        ("a (red) circle", [("a ", 1), ("red", 1.1), (" circle", 1)]),
        ("((a))", [("a", 1.21)]),
        ("[[a]]", [("a", 1 / 1.21)]),
        ("(a:1.3)", [("a", 1.3)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("(a:.5)", [("a", 0.5)]),
        ("(a:0)", [("a", 0)]),
        ("(a [b]:2)", [("a ", 2), ("b", 2 / 1.1)]),
        ("((a:1.2) b:1.5)", [("a", 1.8), (" b", 1.5)]),
        ("(a)(b)", [("ab", 1.1)]),
        ("(a:1) b", [("a b", 1)]),
        ("([a]) b", [("a b", 1)]),
        ("([[(a)]]) b", [("a b", 1)]),
        (r"\(a\) \[b\] \\", [(r"(a) [b] \ ".strip(), 1)]),
        (r"(\(a\):1.5)", [("(a)", 1.5)]),
        ("a \\", [("a ", 1)]),
        (r"\x", [("x", 1)]),
        (r"(a\:1.3)", [("a", 1.3)]),  # a colon cannot be escaped
        (r"[a\|b]", [("a|b", 1 / 1.1)]),
        ("(a b", [("a b", 1.1)]),
        ("[a (b", [("a ", 1 / 1.1), ("b", 1)]),
        ("a) b] c", [("a) b] c", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        ("(at: noon)", [("at: noon", 1.1)]),
        ("a :) b:1.3)", [("a :) b:1.3)", 1)]),
        ("(ä 猫:1.2) é", [("ä 猫", 1.2), (" é", 1)]),
        ("", []),
    ],
)
def test_brackets_weigh_words(text, expected):
    assert runs(text) == expected


@pytest.mark.parametrize("text", ["(a:1.3) [b] ((c", "()", "a | b", "(a:x)", "[a:b:0.5]", "a BREAK b", "\\"])
def test_plain_prompts_stay_as_they_are(text):
    assert AS_IS.parse(text, ", 4k.") == (((f"{text}, 4k.", 1.0),),)


def test_what_is_written_is_what_is_read():
    """Random runs, with every special character, written as text and parsed again."""
    rng, letters = np.random.default_rng(0), list("ab é猫:,|.12()[]\\ ")
    for _ in range(60):
        wanted = []
        for _ in range(rng.integers(1, 6)):
            text = "x" + "".join(rng.choice(letters, rng.integers(0, 8)))
            weight = round(float(rng.choice([1, rng.uniform(0, 9)])), 3)
            if not wanted or wanted[-1][1] != weight:
                wanted.append((text, weight))
        written = "".join(f"({_escaped(text)}:{weight})" for text, weight in wanted)
        assert runs(written) == wanted, written
        assert runs(f"(({written}:1))") == [(text, weight * STEP) for text, weight in wanted]


def _escaped(text: str) -> str:
    return "".join("\\" + c if c in "()[]\\" else c for c in text)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("()", "no words, only brackets"),
        ("((", "no words, only brackets"),
        ("[ ]", "no words, only brackets"),
        ("(:1.3)", "no words, only brackets"),
        ("(a:x)", "'x' is not a weight, a number from 0 to 10"),
        ("(a:1.2.3)", "is not a weight"),
        ("(a:1e3)", "is not a weight"),
        ("(a:nan)", "is not a weight"),
        ("(a:1,3)", "is not a weight"),
        ("(a:-1)", "the weight of 'a' is -1; weights are from 0 to 10"),
        ("(a:10.1)", "the weight of 'a' is 10.1"),
        ("(" * 25 + "a" + ")" * 25, "the weight of 'a' is 10.8347"),
        ("((a:4):4)", "the weight of 'a' is 16"),
        ("[a:b:0.5]", "change the prompt during sampling"),
        ("[a:0.5]", "change the prompt during sampling"),
        ("[a | b]", "change the prompt during sampling"),
        ("a AND b", "guidance of several prompts"),
        ("a <lora:x:0.8>", "give a LoRA with --lora"),
        ("a BREAK b", "use --long-prompts chunk"),
    ],
)
def test_what_a_weighted_prompt_cannot_mean_is_refused_in_one_line(text, reason):
    with pytest.raises(UserError, match=reason) as error:
        WEIGHTED.parse(text)
    assert "\n" not in str(error.value)


def test_brackets_reach_neither_the_suffix_nor_the_next_prompt():
    assert [run.text for run in WEIGHTED.parse("a (b", ", (4k)")[0]] == ["a ", "b", ", ", "4k"]
    assert [words_of((part,)) for part in BOTH.parse("a (b BREAK c) d", " e")] == ["a b", "c d e"]
    with pytest.raises(UserError, match="close the bracket before the |"):
        WEIGHTED.parse("a (b", closed=True)


# ---- tokens ----


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tokens.save_small_tokenizer(tmp_path_factory.mktemp("tokens") / "clip", tiny.WORDS, length=tiny.CONTEXT)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return tokens.save_small_t5_tokenizer(tmp_path_factory.mktemp("tokens") / "t5", tiny.WORDS, length=tiny.CONTEXT)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_the_tokens_of_unweighted_prompts_are_those_of_today(kind, request):
    tokenizer = tokens.load_tokenizer(request.getfixturevalue(kind))
    for text in ("", "a", "a red circle", "a RED dragon, moving", LONG):
        (ids,), mask = tokens.tokenize_with_mask(tokenizer, [text])
        for parts in (AS_IS.parse(text), WEIGHTED.parse(text.replace("red", "(red:1)"))):
            (chunk,) = tokenize_chunks(tokenizer, parts, several=False)
            np.testing.assert_array_equal(chunk.ids, ids)
            assert (chunk.mask is None) == (mask is None) and (mask is None or (chunk.mask == mask[0]).all())
            assert (chunk.weights == 1).all()


def test_weights_belong_to_the_tokens_of_their_words(clip, t5):
    for folder, start in ((clip, 1), (t5, 0)):
        tokenizer, parts = tokens.load_tokenizer(folder), WEIGHTED.parse("a (red circle:1.5) [left]")
        (chunk,) = tokenize_chunks(tokenizer, parts, several=False)
        expected = np.ones(tiny.CONTEXT)
        expected[start + 1 : start + 4] = 1.5, 1.5, 1 / 1.1
        np.testing.assert_allclose(chunk.weights, expected, rtol=1e-6)


def test_long_prompts_fill_windows_of_their_own(clip):
    tokenizer = tokens.load_tokenizer(clip)
    first, second = tokenize_chunks(tokenizer, AS_IS.parse(LONG), several=True)
    words = LONG.split()
    for chunk, part in ((first, words[:6]), (second, words[6:])):
        np.testing.assert_array_equal(chunk.ids, tokens.tokenize(tokenizer, [" ".join(part)])[0])
    assert len(tokenize_chunks(tokenizer, AS_IS.parse(LONG), several=False)) == 1
    assert len(tokenize_chunks(tokenizer, AS_IS.parse(""), several=True)) == 1
    one, two, three = tokenize_chunks(tokenizer, BOTH.parse(f"a BREAK {LONG}"), several=True)
    np.testing.assert_array_equal(one.ids, tokens.tokenize(tokenizer, ["a"])[0])
    np.testing.assert_array_equal([two.ids, three.ids], [first.ids, second.ids])
    for text, count in (("a BREAK", 1), ("BREAK a", 2)):
        assert len(tokenize_chunks(tokenizer, BOTH.parse(text), several=True)) == count


def test_the_vectors_of_an_embedding_stay_in_one_window(clip):
    tokenizer = tokens.load_tokenizer(clip, {"<cat>": 3})
    first, second = tokenize_chunks(tokenizer, BOTH.parse("a a a a (<cat>:2) a"), several=True)
    cat = tokenizer.convert_tokens_to_ids("<cat>")
    assert second.ids[1:5].tolist() == [cat, cat + 1, cat + 2, first.ids[1]]
    assert second.weights[1:5].tolist() == [2, 2, 2, 1]
    (cut,) = tokenize_chunks(tokenizer, AS_IS.parse("a a a a <cat> a"), several=False)
    assert cut.ids[5:7].tolist() == [cat, cat + 1]  # as ever


# ---- hidden states ----


def test_hidden_states_are_multiplied_and_their_mean_restored():
    hidden = np.random.default_rng(0).normal(0.3, 1, (8, 16)).astype(np.float32)
    ones, weights = np.ones(8, np.float32), np.array([1, 1.5, 0.5, 1, 1, 1, 1, 1], np.float32)
    assert weigh(hidden, ones) is hidden
    weighted = weigh(hidden, weights)
    np.testing.assert_allclose(weighted.mean(), hidden.mean(), rtol=1e-5)
    np.testing.assert_allclose(weighted / weighted[0] * hidden[0], hidden * weights[:, None], rtol=1e-3)
    mask = np.arange(8) < 3
    np.testing.assert_allclose(weigh(hidden, weights, mask)[:3].mean(), hidden[:3].mean(), rtol=1e-5)
    centred = hidden - hidden.mean()  # dividing by this mean would be chance
    np.testing.assert_array_equal(weigh(centred, weights), centred * weights[:, None])
    many = np.random.default_rng(0).normal(0.015, 1, (77, 768))
    for dtype in (np.float32, jnp.bfloat16):  # the decision and the dtype are the same in less precision
        low, doubled = many.astype(dtype), np.full(77, 2, np.float32)
        np.testing.assert_array_equal(weigh(low, doubled), 2 * low)
        assert weigh(low, doubled).dtype == weigh(low + np.ones(1, dtype), doubled).dtype == dtype


def test_padding_with_masked_tokens_changes_nothing():
    rng = np.random.default_rng(0)
    q, text = (
        jnp.asarray(rng.normal(size=(1, 5, 2, 4)), jnp.float32),
        Prompts(rng.normal(size=(8, 8)).astype(np.float32)),
    )
    padded = text.padded(16)

    def attend(prompts):
        keys = jnp.asarray(prompts.hidden).reshape(1, -1, 2, 4)
        return attention(q, keys, keys, mask=None if prompts.mask is None else jnp.asarray(prompts.mask)[None])

    np.testing.assert_allclose(attend(text), attend(padded), rtol=1e-5)
    np.testing.assert_array_equal(max_over_words(*map(jnp.asarray, padded)), text.hidden.max(0))
    (window,) = grid(whole(1), whole(1), whole(1))
    short, null = Prompts(text.hidden[:8]), Prompts(text.hidden)
    clips = [
        Clip(text=lambda window, own=own: own, null_text=null, shape=(1, 1, 1, 4), noise=lambda *_: None)
        for own in (short, padded)
    ]
    assert [[p.length for p in pair] for pair in _texts([(clip, window) for clip in clips])] == [[16, 16], [16, 16]]
    (alone,) = _texts([(clips[0], window)])
    assert alone[0] is short and alone[1].mask is None


# ---- samples ----


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tiny.make_base(tmp_path_factory.mktemp("weights") / "base", steps=1, sampler="euler")
    return lavie_jax.load(folder, devices=jax.devices()[:1])


def test_samples_depend_on_weights_and_later_windows_but_not_on_the_batch(pipe):
    def videos(*prompts, **settings):
        return pipe(list(prompts), frames=1, batch_size=len(prompts), **settings).astype(int)  # images compile faster

    weighted = {"prompt_syntax": "weighted"}
    plain = videos("a red circle")
    np.testing.assert_array_equal(videos("a (red:1) ([circle])", **weighted), plain)
    assert (videos("a (red:3) circle", **weighted) != plain).any()
    np.testing.assert_array_equal(videos("a (red:3) circle"), plain)  # brackets are unknown to the small tokenizer
    negative = videos("a red circle", negative_prompt="(blue:3)", **weighted)
    assert (negative != videos("a red circle", negative_prompt="blue")).any()
    cut = videos(LONG)
    several = videos("a red circle", LONG, long_prompts="chunk")
    assert np.abs(several[0] - plain[0]).max() <= 1 and (several[1] != cut[0]).any()
    assert np.abs(several[1] - videos(LONG, long_prompts="chunk")[0]).max() <= 1


def test_prompts_over_time_of_different_lengths_are_mixed_over_equal_windows(pipe):
    texts = [AS_IS.parse("a red circle"), AS_IS.parse(LONG)]
    short, long = pipe.base.encode_prompts(texts, several=True)
    assert short.length == long.length == 2 * tiny.CONTEXT
    alone = pipe.base.encode_prompts(texts[:1], several=True)[0]
    np.testing.assert_array_equal(short.hidden[: tiny.CONTEXT], alone.hidden)
    np.testing.assert_array_equal(short.hidden[tiny.CONTEXT :], pipe.base.encode_text([""]).hidden[0])
    np.testing.assert_array_equal(alone.hidden, pipe.base.encode_text(["a red circle"]).hidden[0])


def test_texts_are_checked_before_sampling(pipe, t5):
    settings = {"base": BaseSettings(**tiny.SAMPLING)}
    prompts = [{"base": [("a (dragon) " + LONG, 1)]}]
    unknown_and_cut = check_texts(pipe.weights, settings, prompts, [None], WEIGHTED)
    assert len(unknown_and_cut) == 2 and "dragon" in unknown_and_cut[1] and "(" not in unknown_and_cut[0]
    assert len(check_texts(pipe.weights, settings, prompts, [None], BOTH)) == 1
    (pieces,) = check_texts(pipe.weights, settings, [{"base": [("a (re)d", 1)]}], [None], WEIGHTED)
    assert "ignored: re, d" in pieces  # brackets divide a word
    alone = {"base": dataclasses.replace(settings["base"], guidance=1.0)}  # as of a distilled model
    ignored, *_ = check_texts(pipe.weights, alone, prompts, ["a blue square"], BOTH)
    assert ignored.startswith("stage base ignores the negative prompt, which only guidance reads")
    assert len(check_texts(pipe.weights, alone, prompts, [None], BOTH)) == 1
    with pytest.raises(UserError, match="no words, only brackets"):
        check_texts(pipe.weights, settings, prompts, ["()"], WEIGHTED)
    with pytest.raises(UserError, match="close the bracket"):
        check_texts(pipe.weights, settings, [{"base": [("a (b", 4), ("c)", 4)]}], [None], WEIGHTED)
    masked = {"base": dataclasses.replace(pipe.weights["base"], tokenizer_dir=t5)}
    assert check_texts(masked, settings, [{"base": [("a red circle", 1)]}], [None], WEIGHTED) == []
    with pytest.raises(UserError, match="long_prompts = chunk is for CLIP") as error:
        check_texts(masked, settings, prompts, [None], BOTH)
    assert "\n" not in str(error.value)


def test_the_reading_is_recorded_and_read_back():
    settings, hashes = {"base": BaseSettings(**tiny.SAMPLING)}, {"base": "0" * 64}
    plain = make_request("a", 0, settings, hashes)
    assert not {"prompt_syntax", "long_prompts"} & set(plain) and Reading.stored(plain) == AS_IS
    request = json.loads(json.dumps(make_request("a", 0, settings, hashes, reading=BOTH)))
    assert Reading.stored(request) == BOTH
    assert {"--prompt-syntax=weighted", "--long-prompts=chunk"} <= set(options_of(request))
    args = sample.parse_args(options_of(request))
    sample.read_requests(args)
    assert args.reading == BOTH


@pytest.mark.parametrize("text, reason", [("a\ud800", "not valid Unicode"), ("a\0", "NUL")])
def test_requests_are_text(text, reason):
    for prompt, negative, name in ((text, None, "^prompt"), ("a", text, "^negative_prompt")):
        with pytest.raises(UserError, match=f"{name}.*{reason}"):
            Request.make(prompt, None, 4, seed=0, negative_prompt=negative)


def test_mistakes_end_the_command_in_one_line(tmp_path, capsys):
    folder = tiny.make_base(tmp_path / "base")
    arguments = ["--weights", str(folder), "--out", str(tmp_path / "out"), "--prompt-syntax", "weighted"]
    for prompt, reason in (("()", "no words"), ("(a:-1)", "weights are from 0 to 10")):
        assert sample.main([*arguments, "--prompt", prompt]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="prompt_syntax: unknown value 'a1111'"):
        Reading("a1111")
