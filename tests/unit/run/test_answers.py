"""predict_with_generate in an evaluation: what is a prompt, how tokens are chosen, LLaMA-Factory's scores."""

from types import SimpleNamespace

import numpy as np
import pytest

from dataflex_mega.data.pool import Sample
from dataflex_mega.llamafactory.similarity import METRICS, similarities
from dataflex_mega.run.answers import answers_prompts, generation_spec, notes_on_answers, split_last_answer
from dataflex_mega.types import GenerationSpec

WORDS = ["", "the", "cat", "sat", "on", "a", "mat", "dog"]


class Words:
    """A tokenizer of words; 0 is padding."""

    pad_token_id = eos_token_id = 0

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(WORDS[i] for i in row if i) for row in rows]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([-100, -100, 7, 8], ([5, 6], [7, 8])),
        ([-100, 6, -100, 8], ([5, 6, 7], [8])),
        ([-100, 6, 7, -100], ([5], [6, 7])),
        ([5, 6, 7, 8], None),
        ([-100] * 4, None),
    ],
)
def test_the_last_answer_and_all_that_is_before_it(labels, expected):
    found = split_last_answer(Sample(0, 0, np.array([5, 6, 7, 8]), np.array(labels)))
    assert found is None if expected is None else tuple(part.tolist() for part in found) == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, GenerationSpec(8, 0.95, 50, 0.7)),
        ({"do_sample": False}, GenerationSpec(8, top_k=1)),
        ({"temperature": 0.0}, GenerationSpec(8, top_k=1)),
        ({"top_k": -1}, GenerationSpec(8, 0.95, 0, 0.7)),
        ({"max_new_tokens": 0}, GenerationSpec(20, 0.95, 50, 0.7)),
        ({"max_new_tokens": -1, "max_length": 5}, GenerationSpec(1, 0.95, 50, 0.7)),
    ],
)
def test_llamafactorys_generating_arguments(keys, expected):
    values = {"do_sample": True, "temperature": 0.95, "top_k": 50, "top_p": 0.7, "max_new_tokens": 8, "max_length": 32}
    assert generation_spec(SimpleNamespace(**{**values, **keys}), 12) == expected


def test_scores_are_those_of_each_pair_by_llamafactory():
    from llamafactory.train.sft.metric import ComputeSimilarity

    answers = [np.array([1, 2, 3, 4, 5, 6]), np.array([7, 0]), np.array([], dtype=np.int64)]
    references = [np.array([1, 2, 3, 4, 1, 6]), np.array([7]), np.array([1, 2])]
    values = similarities(Words(), answers, references)
    for row, answer, reference in zip(values, answers, references, strict=True):
        pair = SimpleNamespace(
            predictions=answer[None] if len(answer) else np.zeros((1, 1), int), label_ids=reference[None]
        )
        alone = ComputeSimilarity(tokenizer=Words())(pair)
        assert row.tolist() == pytest.approx([alone[name] for name in METRICS])
    assert values[0, 0] > 50 and values[2].tolist() == pytest.approx([0, 0, 0, 0], abs=1e-3)


def session_of(engine="fsdp", stage="sft", strategy="steps", **keys):
    lf = {"predict_with_generate": True, **keys}
    training = SimpleNamespace(eval_strategy=SimpleNamespace(value=strategy))
    args = SimpleNamespace(finetuning=SimpleNamespace(stage=stage), training=training)
    return SimpleNamespace(config=SimpleNamespace(engine=engine, llamafactory=lf), args=args)


class Pictures:
    """Rows with images."""

    def media_kinds(self):
        return ("images",)

    def media(self, rows):
        return []


def pools(rows):
    return {"": SimpleNamespace(domains=[SimpleNamespace(rows=rows)])}


@pytest.mark.parametrize(
    ("session", "rows", "answers", "note"),
    [
        (session_of(), [], True, None),
        (session_of(predict_with_generate=False), [], False, None),
        (session_of(strategy="no"), [], True, None),
        (session_of(stage="pt"), [], False, None),
        (session_of("megatron"), [], False, "engine: megatron does not generate"),
        (session_of(), Pictures(), False, "prompts with images, videos or audio are answered by the finished model"),
        (session_of(num_beams=4), [], True, "num_beams: 4 acts on the answers after training"),
    ],
)
def test_where_prompts_are_answered_and_what_a_note_says(session, rows, answers, note):
    assert answers_prompts(session, pools(rows)) is answers
    notes = notes_on_answers(session, pools(rows))
    assert len(notes) == (note is not None) and all(note in line for line in notes)
