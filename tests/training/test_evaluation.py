"""Evaluation: the images that it looks at, the mode that it leaves behind, what a record says of answers (by hand and by scikit-learn)."""

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, precision_recall_fscore_support, roc_auc_score
from slim_runs import noise
from torch import nn
from training_nets import Viewed, blobs, tiny_net

from rmprune.training import evaluate
from rmprune.training.evaluation import scores


def test_evaluate_limits_and_restores_the_mode():
    data, model = blobs(), tiny_net().train()
    model[1].eval()
    result = evaluate(model, data.test, batch_size=7, limit=10)
    assert model.training and not model[1].training
    x, y = next(data.test.batches(10))
    output = model.eval()(x)
    assert result.accuracy == pytest.approx(float((output.argmax(1) == y).float().mean()))
    assert result.loss == pytest.approx(nn.functional.cross_entropy(output, y).item(), rel=1e-5)


def test_code_that_views_maps_as_they_lie_is_evaluated():
    data, model = noise(), Viewed()
    model.body[0], model.head = nn.Conv2d(3, 6, 3), nn.Linear(16, 10)  # of one channel maps lie alike in both orders
    model.eval()
    x, y = next(data.test.batches(len(data.test)))
    assert evaluate(model, data.test).accuracy == pytest.approx(float((model(x).argmax(1) == y).float().mean()))


@pytest.mark.parametrize("classes", [2, 4])
def test_scores_are_scikit_learns(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(0, classes, (60,), generator=generator) * torch.randint(0, 2, (60,), generator=generator)
    logits = torch.randn(60, classes, generator=generator) + torch.nn.functional.one_hot(labels, classes)
    found, told = scores(logits, labels, [f"kind {c}" for c in range(classes)]), logits.argmax(1)
    chances = logits.double().softmax(1)
    assert found["accuracy"] == pytest.approx(float((told == labels).double().mean()))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, told))
    expected = roc_auc_score(labels, chances[:, 1] if classes == 2 else chances, multi_class="ovr")
    assert found["auc"] == pytest.approx(expected)
    precision, recall, _, images = precision_recall_fscore_support(labels, told)
    for c, entry in enumerate(found["classes"]):
        assert entry == {
            "name": f"kind {c}",
            "images": images[c],
            "recall": pytest.approx(recall[c]),
            "precision": pytest.approx(precision[c]),
        }


@pytest.mark.parametrize("classes", [2, 3])
def test_the_area_is_of_ranks_where_probabilities_are_rounded_to_1(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels, found = torch.arange(200) % classes, []
    logits = 2 * torch.randn(200, classes, generator=generator) + torch.nn.functional.one_hot(labels, classes)
    logits[:, 0] -= 1
    for sharper in (1, 1000):  # monotone in the odds of two classes, and of several near enough
        odds = logits.double() * sharper
        found.append(scores(odds, labels)["auc"])
        each = [
            roc_auc_score(labels == c, odds[:, c] - odds[:, [i for i in range(classes) if i != c]].logsumexp(1))
            for c in range(classes)
        ]
        assert found[-1] == pytest.approx(sum(each) / classes)
    assert found[1] == pytest.approx(found[0], abs=0.03)


def test_a_class_that_is_not_there_and_one_that_is_never_said() -> None:
    found = scores(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([0, 1]))
    assert found["auc"] is None and found["balanced_accuracy"] == 0.5
    assert [(entry["name"], entry["recall"], entry["precision"]) for entry in found["classes"]] == [
        ("0", 1.0, 0.5), ("1", 0.0, None), ("2", None, None),
    ]  # fmt: skip
