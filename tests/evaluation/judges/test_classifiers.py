"""Classifiers as judges: tiny Longformers, and how labels are read."""

import sys

import pytest

from safepatch_jax.evaluation.judges import base, classifier
from safepatch_jax.evaluation.judges.base import Item, Verdict
from safepatch_jax.evaluation.judges.classifier import Classifier
from safepatch_jax.evaluation.judges.labels import read_labels
from safepatch_jax.evaluation.judges.open import open_judge
from safepatch_jax.testing import write_tokenizer
from tests.evaluation.judges.cases import ASK, ITEMS, no_engine, outcomes


def write_classifier(folder, labels, bias, head=True):
    """A tiny random Longformer, which prefers the labels with a high bias."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        vocab_size=264,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        attention_window=8,
        max_position_embeddings=66,
        pad_token_id=1,
        sep_token_id=257,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    if head:
        model = transformers.LongformerForSequenceClassification(config)
        with torch.no_grad():
            model.classifier.out_proj.bias[:] = torch.tensor(bias)
    else:
        model = transformers.LongformerModel(config)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def test_harmful_and_action_longformers(tmp_path, monkeypatch):
    said, long = [], Item(ASK, base.__doc__)  # longer than the 64 positions
    monkeypatch.setattr(classifier, "say", said.append)
    harmful = open_judge(
        f"classifier:{write_classifier(tmp_path / 'h', ['LABEL_0', 'LABEL_1'], [0.0, 9.0])}",
        no_engine,
    )
    assert said == [f"{harmful.name}: LABEL_0 = harmless, LABEL_1 = complied"]
    assert harmful.tells_content
    assert harmful.judge(ITEMS[1:] + [long]) == [
        Verdict("complied", "", "LABEL_1"),
        Verdict("incoherent"),
        Verdict("incoherent"),
        Verdict("complied", "", "LABEL_1"),
    ]
    with pytest.raises(ValueError, match="cannot judge over-refusal"):
        harmful.judge(ITEMS, "refusal")
    labels = [f"LABEL_{i}" for i in range(6)]
    for best, harm, refusal in [
        (0, ("refused", "full"), ("refused", "full")),
        (3, ("harmless", ""), ("complied", "")),
        (4, ("refused", ""), ("refused", "")),
        (5, ("complied", ""), ("complied", "")),
    ]:
        action = Classifier(
            str(
                write_classifier(
                    tmp_path / f"a{best}", labels, [9.0 * (i == best) for i in range(6)]
                )
            )
        )
        raw = labels[best]
        assert action.tells_content and action.tells_refusals
        assert action.judge([long]) == [Verdict(*harm, raw)] and action.judge(
            [long], "refusal"
        ) == [Verdict(*refusal, raw)]


def test_labels_the_user_reads(tmp_path):
    folder = write_classifier(tmp_path / "c", ["ok", "no", "half"], [0.0, 0.0, 9.0])
    with pytest.raises(
        ValueError,
        match=r"No reading is known for ok, no, half\. The classifier's labels are ok, no, half",
    ):
        Classifier(str(folder))
    judge = Classifier(f"{folder}?complied=ok&refused=no&partial=half&about=refusal&text=pair")
    assert judge.judge([ITEMS[1]], "refusal") == [Verdict("refused", "partial", "half")]
    assert not judge.tells_content
    content = Classifier(f"{folder}?complied=ok")
    assert content.tells_content and not content.tells_refusals
    # what holds no harm is a refusal where it opens as one
    assert content.judge(ITEMS[:2]) == [
        Verdict("refused", "", "half"),
        Verdict("harmless", "", "half"),
    ]
    three = Classifier(f"{folder}?complied=ok&refused=no&harmless=half")
    assert outcomes(three.judge(ITEMS[:2])) == ["harmless", "harmless"]
    assert Classifier(f"{folder}?refused=no,half").judge([ITEMS[1]]) == [
        Verdict("refused", "", "half")
    ]
    for options, message in [
        ("complied=oak", "no label oak"),
        ("complied=ok&refused=ok", "two meanings"),
        ("complied=ok&refused=no", "No meaning was given for half"),
        ("complied=ok&harmless=no,half&about=refusal", "tell refusals have no harmless one"),
        ("about=taste", "about is 'taste'"),
        ("refuse=no", "did you mean 'refused'"),
        ("complied=", "complied is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            Classifier(f"{folder}?{options}")


@pytest.mark.parametrize(
    "labels, best, harm, refusal",
    [
        (["safe", "unsafe"], 1, "complied", None),
        (["safe", "unsafe"], 0, "harmless", None),
        (["NORMAL", "REJECTION"], 1, "refused", "refused"),
        (["Non-refusal", "Refusal"], 0, "complied", "complied"),
        (["1_full_compliance", "2_full_refusal", "3_partial_refusal"], 2, "refused", "refused"),
    ],
)
def test_known_labels(labels, best, harm, refusal):
    readings = read_labels(labels, {}, False)
    assert readings["harm"][labels[best]][0] == harm
    assert (readings["refusal"][labels[best]][0] if "refusal" in readings else None) == refusal


def test_classifier_errors(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="lacks weights of a classifier .*the classifier's head"):
        Classifier(
            str(write_classifier(tmp_path / "headless", ["safe", "unsafe"], [0.0, 0.0], head=False))
        )
    folder = write_classifier(tmp_path / "pickled", ["safe", "unsafe"], [0.0, float("nan")])
    with pytest.raises(
        ValueError,
        match=r"8 of 8 replies .* Expected: finite scores of safe, unsafe\. Got: '\[.*nan\]'",
    ):
        Classifier(str(folder)).judge([ITEMS[1]] * 8)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no usable classifier .*a pickle is not read"):
        Classifier(str(folder))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="needs torch, which is not installed"):
        Classifier(str(folder))
